"""Distributed checkpoints of the DiT, weights and optimizer state, load in any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from nemo_cosmos.parallel import startup
from tests.distributed.dit_step import Layout, Step, named_parameters, own_slice, train_one_step
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

ROAD = {
    "TP2": Layout(tensor=2),
    "one rank, twice": Layout(data=2),
    "PP2": Layout(pipeline=2),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "PP2 interleaved": Layout(pipeline=2, virtual=2),
    "CP2": Layout(context=2),
}
"""Layouts that one checkpoint passes through: each loads what the one before has saved, and saves it again."""


def sharded_state(step: Step, *, is_loading: bool) -> ShardedStateDict:
    model = {f"chunk_{i}": chunk.sharded_state_dict() for i, chunk in enumerate(step.chunks)}
    return {**model, "optimizer": step.optimizer.sharded_state_dict(model, is_loading=is_loading)}


@torch.no_grad()
def forget(step: Step) -> None:
    for _, parameter in named_parameters(step.chunks):
        parameter.fill_(torch.nan)
    for state in step.optimizer.chained_optimizers[0].optimizer.state.values():
        state["exp_avg"].fill_(torch.nan)


def assert_equals_trained(step: Step, trained: dict[str, dict[str, torch.Tensor]], where: str) -> None:
    for name, weight in named_parameters(step.chunks):
        assert torch.equal(weight, own_slice(name, trained["weights"][name])), f"{where}: weight {name}"
    for name, moment in step.moments().items():
        assert torch.equal(moment, own_slice(name, trained["moments"][name])), f"{where}: moment of {name}"


def travel(rank: int, folder: Path, reference_file: Path) -> None:
    """Loads the reference's values into the first layout, and then hands them on bit by bit equal."""
    reference = torch.load(reference_file)
    shapes = {name: weight.shape for name, weight in reference["first"].items()}
    previous: Path | None = None
    for where, layout in ROAD.items():
        with startup.initialize(**layout.groups):
            step = train_one_step(layout, shapes)
            if previous is None:
                put_in(step, reference)
            else:
                forget(step)
                loaded = dist_checkpointing.load(sharded_state(step, is_loading=True), str(previous))
                for i, chunk in enumerate(step.chunks):
                    chunk.load_state_dict(loaded[f"chunk_{i}"])
                step.optimizer.load_state_dict(loaded["optimizer"])
            assert_equals_trained(step, reference, where)
            previous = folder / where
            previous.mkdir(exist_ok=True)
            dist_checkpointing.save(sharded_state(step, is_loading=False), str(previous))


@torch.no_grad()
def put_in(step: Step, reference: dict[str, dict[str, torch.Tensor]]) -> None:
    state = step.optimizer.chained_optimizers[0].optimizer.state
    for name, parameter in named_parameters(step.chunks):
        parameter.copy_(own_slice(name, reference["weights"][name]))
        state[parameter]["exp_avg"].copy_(own_slice(name, reference["moments"][name]))


def test_checkpoint_passes_through_all_layouts_unchanged(one_rank_step: Path, tmp_path: Path) -> None:
    run_ranks(travel, 2, tmp_path, one_rank_step)
