"""Distributed checkpoints of the tokenizer, weights and optimizer state, load in any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole_tensors, stored_dtypes, stored_shapes
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from tests.distributed.launch import run_ranks
from tests.distributed.tokenizer_step import Layout, Step, step_by_megatron
from tests.unit.tokenizer.conftest import random_tokenizer

pytestmark = pytest.mark.distributed

ARCHITECTURE = TokenizerConfig(
    channels=4,
    channels_mult=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    patch_size=4,
    spatial_compression=8,
    temporal_compression=4,
)
ROAD = {
    "TP2": Layout(architecture=ARCHITECTURE, tensor=2),
    "one rank, twice": Layout(architecture=ARCHITECTURE, data=2),
    "PP2": Layout(architecture=ARCHITECTURE, pipeline=2),
    "TP2 again": Layout(architecture=ARCHITECTURE, tensor=2),
}
"""Layouts that one checkpoint passes through: each loads what the one before has saved, and saves it again."""


def sharded_state(step: Step, *, is_loading: bool) -> ShardedStateDict:
    model = step.model.sharded_state_dict()
    return {"model": model, "optimizer": step.optimizer.sharded_state_dict({"model": model}, is_loading=is_loading)}


def stored(folder: Path) -> dict[str, Tensor]:
    dtypes = stored_dtypes(folder)
    tensors = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in stored_shapes(folder).items()}
    read_whole_tensors(tensors, folder)
    return tensors


@torch.no_grad()
def forget(step: Step) -> None:
    for weight in step.model.parameters():
        weight.fill_(torch.nan)
    for state in step.optimizer.chained_optimizers[0].optimizer.state.values():
        state["exp_avg"].fill_(torch.nan)


def travel(rank: int, folder: Path, start: Path) -> None:
    previous: Path | None = None
    for where, layout in ROAD.items():
        with startup.initialize(**layout.groups):
            step = step_by_megatron(layout, start)
            if previous is not None:
                forget(step)
                loaded = dist_checkpointing.load(sharded_state(step, is_loading=True), str(previous))
                step.model.load_state_dict(loaded["model"])
                step.optimizer.load_state_dict(loaded["optimizer"])
            previous = folder / where
            previous.mkdir(exist_ok=True)
            dist_checkpointing.save(sharded_state(step, is_loading=False), str(previous))


def test_a_checkpoint_passes_through_all_layouts_unchanged(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(ARCHITECTURE)
    run_ranks(travel, 2, tmp_path, weights.save(tokenizer, tmp_path / "start"))
    first, *others = (stored(tmp_path / where) for where in ROAD)
    for name, weight in tokenizer.state_dict().items():
        assert first[name].shape == weight.shape
        assert not torch.equal(first[name], weight)  # for a step was made
    assert sum("exp_avg" in name for name in first) == 2 * len(tokenizer.state_dict())
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), name
