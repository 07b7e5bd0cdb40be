"""Two tensor-parallel ranks write the tokens, and generate the video, that one rank does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_cosmos.autoregressive.decode import UNKNOWN, write_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.speculation import MedusaDrafter
from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampling
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation import open as opening
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.parallel import startup
from tests.distributed.ar_step import AR, TEXT
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_step import Layout, give_every_weight_a_value, named_parameters
from tests.unit.generation.small_autoregressive import WITH_ACTIONS, write_small
from tests.unit.generation.word_encoder import WordEncoder

pytestmark = pytest.mark.distributed

GRID = (3, 2, 4)
TASKS = ("videos", "tied")


def write(layout: Layout, whole_shapes: dict[str, torch.Size] | None) -> tuple[dict, dict[str, torch.Size]]:
    """What a layout writes, and the shapes of its parameters."""
    with startup.initialize(**layout.groups):
        model: CosmosAR = AR.build(layout).eval()
        shapes = {name: p.shape for name, p in named_parameters([model])}
        give_every_weight_a_value(AR, [model], whole_shapes or shapes)
        config, generator = model.config, torch.Generator().manual_seed(3)
        tokens = torch.randint(config.vocab_size, (2, config.num_first + 24), generator=generator)
        if config.special_tokens:
            tokens[:, 0] = config.begin_of_video
        tokens[:, config.num_first + 8 :] = UNKNOWN
        text = torch.randn(2, TEXT, 12, generator=generator) if config.crossattn_emb_channels else None
        drafter = MedusaDrafter(model) if config.num_medusa_heads else None
        written = {
            name: write_tokens(model, tokens, GRID, text, sampling=sampling, seeds=[4, 5], drafter=drafter)
            for name, sampling in (("greedy", GREEDY), ("sampled", TokenSampling(top_p=0.9)))
        }
        return {name: (w.tokens_BS, w.num_passes) for name, w in written.items()}, shapes


def write_on_one_rank(rank: int, folder: Path) -> None:
    for task in TASKS:
        torch.save(write(Layout(task=task), None), folder / f"{task}.pt")


def compare_with_one_rank(rank: int, folder: Path, expected: Path) -> None:
    for task in TASKS:
        written, shapes = torch.load(expected / f"{task}.pt")
        for sequence_parallel in (False, True):
            got, _ = write(Layout(tensor=2, sequence_parallel=sequence_parallel, task=task), shapes)
            for name, (tokens, num_passes) in written.items():
                assert torch.equal(got[name][0], tokens), f"{task}, {name}"
                assert got[name][1] == num_passes


def test_tokens_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    run_ranks(write_on_one_rank, 1, tmp_path / "one")
    run_ranks(compare_with_one_rank, 2, tmp_path / "two", tmp_path / "one")


SAMPLING = SamplingConfig(num_frames=25, height=16, width=24, overlap_frames=9, seed=7)
"""Two windows."""


def generate(checkpoint: Path, tokenizer: Path, layout: GenerationLayout) -> np.ndarray:
    opening.load_text_encoder = lambda name: MovedEncoder()
    rng = np.random.default_rng(0)
    given = {
        "first_frames": [rng.integers(0, 255, (1, 16, 24, 3), dtype=np.uint8)],
        "actions": rng.normal(size=(1, 24, 7)).astype(np.float32),
    }
    with opening.open_world_model(checkpoint, tokenizer, layout=layout) as model:
        return model.generate(["A car drives."], SAMPLING, **given)[0]


class MovedEncoder(WordEncoder):
    def to(self, device: torch.device) -> MovedEncoder:
        return self


def generate_on_one_rank(rank: int, folder: Path) -> None:
    with startup.initialize():
        checkpoint, tokenizer = write_small(folder, **WITH_ACTIONS)
    np.save(folder / "video.npy", generate(checkpoint, tokenizer, GenerationLayout()))


def compare_video_with_one_rank(rank: int, folder: Path, expected: Path) -> None:
    files = (expected / "small.safetensors", expected / "tokenizer")
    video = generate(*files, GenerationLayout(tensor=2))
    assert (video == np.load(expected / "video.npy")).all()
    with pytest.raises(UserError, match="layout: got {'tensor': 2, 'sequence_parallel': True}, expected tensor alone"):
        generate(*files, GenerationLayout(tensor=2, sequence_parallel=True))


def test_videos_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    run_ranks(generate_on_one_rank, 1, tmp_path / "one")
    run_ranks(compare_video_with_one_rank, 2, tmp_path / "two", tmp_path / "one")
