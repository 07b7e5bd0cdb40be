"""Distributed checkpoints of the DiT, weights and optimizer state, load in any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.fsdp import local_shard
from nemo_cosmos.parallel.stored_weights import read_whole_tensors, stored_dtypes, stored_shapes
from tests.distributed.dit_step import Layout, Step, named_parameters, train_one_step
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

ROADS = {
    "plain optimizer": {
        "TP2": Layout(tensor=2),
        "DP2": Layout(data=2),
        "PP2": Layout(pipeline=2),
        "PP2 interleaved": Layout(pipeline=2, virtual=2),
        "CP2": Layout(context=2),
    },
    "distributed optimizer": {
        "DP2": Layout(data=2, distributed_optimizer=True),
        "FSDP": Layout(data=2, fsdp=True),
        "TP2 SP": Layout(tensor=2, sequence_parallel=True, distributed_optimizer=True),
        "FSDP over context": Layout(context=2, fsdp=True),
        "PP2": Layout(pipeline=2, distributed_optimizer=True),
        "CP2": Layout(context=2, distributed_optimizer=True),
    },
    "four ranks": {
        "TP2 SP FSDP": Layout(tensor=2, data=2, sequence_parallel=True, fsdp=True),
        "TP2 DP2": Layout(tensor=2, data=2, distributed_optimizer=True),
        "TP2 PP2": Layout(tensor=2, pipeline=2, distributed_optimizer=True),
        "TP2 SP CP2": Layout(tensor=2, context=2, sequence_parallel=True, distributed_optimizer=True),
        "PP2 CP2": Layout(pipeline=2, context=2, distributed_optimizer=True),
    },
}
"""Layouts that one checkpoint passes through: each loads what the one before has saved, and saves it again.

What the first saves is compared with one rank's training.
"""


def sharded_state(step: Step, *, is_loading: bool) -> ShardedStateDict:
    model = {f"chunk_{i}": chunk.sharded_state_dict() for i, chunk in enumerate(step.chunks)}
    # As training saves the states of the distributed optimizer; others have one way only.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    return {**model, "optimizer": step.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)}


@torch.no_grad()
def forget(step: Step) -> None:
    for _, parameter in named_parameters(step.chunks):
        local_shard(parameter).fill_(torch.nan)
    [optimizer] = step.optimizer.chained_optimizers
    for state in optimizer.optimizer.state.values():
        local_shard(state["exp_avg"]).fill_(torch.nan)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    dtypes = stored_dtypes(folder)
    tensors = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in stored_shapes(folder).items()}
    read_whole_tensors(tensors, folder)
    return tensors


def travel(rank: int, folder: Path, roads: list[str], references: Path) -> None:
    shapes = {name: weight.shape for name, weight in torch.load(references / "videos.pt")["first"].items()}
    for road in roads:
        previous: Path | None = None
        for where, layout in ROADS[road].items():
            with startup.initialize(**layout.groups):
                step = train_one_step(layout, shapes)
                if previous is not None:
                    forget(step)
                    loaded = dist_checkpointing.load(sharded_state(step, is_loading=True), str(previous))
                    for i, chunk in enumerate(step.chunks):
                        chunk.load_state_dict(loaded[f"chunk_{i}"])
                    step.optimizer.load_state_dict(loaded["optimizer"])
                previous = folder / road / where
                previous.mkdir(exist_ok=True, parents=True)
                dist_checkpointing.save(sharded_state(step, is_loading=False), str(previous))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_checkpoint_passes_through_all_layouts_unchanged(num_ranks: int, one_rank_steps: Path, tmp_path: Path) -> None:
    roads = {road: layouts for road, layouts in ROADS.items() if {x.num_ranks for x in layouts.values()} == {num_ranks}}
    run_ranks(travel, num_ranks, tmp_path, list(roads), one_rank_steps)
    trained = torch.load(one_rank_steps / "videos.pt")
    for road, layouts in roads.items():
        first, *others = (stored(tmp_path / road / where) for where in layouts)
        for name, weight in trained["weights"].items():
            torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-5)
            moment = first[f"optimizer.state.exp_avg.{name}"]
            torch.testing.assert_close(moment, trained["moments"][name], rtol=0, atol=1e-6)
        for where, other in zip(list(layouts)[1:], others, strict=True):
            assert other.keys() == first.keys(), where
            for name, tensor in first.items():
                assert torch.equal(other[name], tensor), f"{road}, {where}: {name}"
