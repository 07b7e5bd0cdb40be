"""A seed gives the same video in every layout of 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.sampling import SamplingConfig
from tests.distributed.launch import run_ranks
from tests.distributed.same import assert_same

pytestmark = pytest.mark.distributed

CHECKPOINT = "diffusion_tiny_text2world"
SAMPLING = SamplingConfig(
    num_frames=17, height=32, width=64, num_steps=3, sampler="res_2ab", guidance=2.0, input_frames_guidance=True, seed=7
)
LAYOUTS = {
    2: {
        "CP2": GenerationLayout(context=2),
        "TP2": GenerationLayout(tensor=2),
        "TP2 SP": GenerationLayout(tensor=2, sequence_parallel=True),
        "PP2": GenerationLayout(pipeline=2),
        "FSDP2": GenerationLayout(shard_weights=True),
        "CP2 FSDP2": GenerationLayout(context=2, shard_weights=True),
        "branches": GenerationLayout(split_guidance=True),
    },
    4: {
        "TP2 CP2": GenerationLayout(tensor=2, context=2),
        "CP2 branches FSDP4": GenerationLayout(context=2, split_guidance=True, shard_weights=True),
        "TP2 SP branches": GenerationLayout(tensor=2, sequence_parallel=True, split_guidance=True),
        "TP2 FSDP2": GenerationLayout(tensor=2, shard_weights=True),
        "TP2 SP PP2": GenerationLayout(tensor=2, sequence_parallel=True, pipeline=2),
    },
}
RELATIVE = 2e-5
"""Of the largest latent: fp32 sums in another order, through three steps from sigma 80 and guidance."""


class CountedEncoder:
    """Text states that depend on the prompt, and a count of how often they are made in this process."""

    loads = 0

    def to(self, device):
        CountedEncoder.loads += 1
        return self

    def encode(self, prompts):
        states = torch.stack(
            [torch.randn(8, 384, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        )
        return states, torch.ones(len(prompts), 8, dtype=torch.bool)


def _generate(layout):
    from nemo_cosmos.generation import open as opening

    opening.load_text_encoder = lambda name: CountedEncoder()
    frames = np.random.default_rng(0).integers(0, 255, (1, 32, 64, 3), dtype=np.uint8)
    with opening.open_world_model(CHECKPOINT, layout=layout) as model:
        inputs = {"first_frames": [frames], "negative_prompt": "blur"}
        latent = model.sample(["A car drives."], SAMPLING, **inputs)
        video = model.generate(["A car drives."], SAMPLING, **inputs)[0]
        held = model.network.use(_numbers_held)
    return latent, video, held


def _numbers_held(network):
    """Numbers of the blocks' weights in this rank's memory."""
    weights = [p.to_local() if hasattr(p, "to_local") else p for block in network.blocks for p in block.parameters()]
    return sum(weight.numel() for weight in weights)


def save_one_rank(rank: int, folder: Path) -> None:
    latent, video, held = _generate(GenerationLayout())
    torch.save({"latent": latent, "video": torch.from_numpy(video), "held": held}, folder / "one.pt")


def compare_layouts(rank: int, folder: Path, num_ranks: int, reference_file: Path) -> None:
    reference = torch.load(reference_file)
    for name, layout in LAYOUTS[num_ranks].items():
        before = CountedEncoder.loads
        latent, video, held = _generate(layout)
        assert_same(f"{name}: latent", latent, reference["latent"], relative=RELATIVE)
        # A pixel next to a rounding edge may fall to the other side.
        assert np.abs(video.astype(int) - reference["video"].numpy().astype(int)).max() <= 1, name
        cut = layout.tensor * layout.pipeline
        shares = num_ranks if layout.shard_weights else cut
        # Norms and adaptive norms stand whole on every tensor-parallel rank.
        assert held <= reference["held"] / shares * 1.35 if shares > 1 else held == reference["held"], name
        assert CountedEncoder.loads - before == (rank == 0), f"{name}: text encoder on rank {rank}"


@pytest.fixture(scope="module")
def one_rank_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with latent and video of one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    run_ranks(save_one_rank, 1, folder)
    return folder / "one.pt"


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_layout_gives_the_video_of_one_rank(num_ranks: int, one_rank_video: Path, tmp_path: Path) -> None:
    run_ranks(compare_layouts, num_ranks, tmp_path, num_ranks, one_rank_video)


def share_and_refuse(rank: int, folder: Path) -> None:
    from nemo_cosmos.generation.open import open_world_model
    from nemo_cosmos.parallel.first_rank import is_first_rank, on_first_rank

    assert on_first_rank(lambda: rank) == 0
    assert is_first_rank() == (rank == 0)

    def refuse():
        raise UserError("prompt: refused")

    with pytest.raises(UserError, match="prompt: refused"):
        on_first_rank(refuse)
    with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match="division by zero"):
        on_first_rank(lambda: 1 / 0)
    with pytest.raises(UserError, match="number of processes: got 2"), open_world_model(CHECKPOINT):
        pass
    with (
        pytest.raises(UserError, match="guidance: got 0"),
        open_world_model(CHECKPOINT, layout=GenerationLayout(split_guidance=True)) as model,
    ):
        model.generate([""], SamplingConfig(num_frames=9, height=32, width=32))
    with (
        pytest.raises(UserError, match="context-parallel size: got 2.*divisor of the 1 tokens"),
        open_world_model(CHECKPOINT, layout=GenerationLayout(context=2)) as model,
    ):
        model.generate([""], SamplingConfig(num_frames=1, height=16, width=16))


def test_what_one_rank_does_for_all_and_what_is_refused_on_all(tmp_path: Path) -> None:
    run_ranks(share_and_refuse, 2, tmp_path)
