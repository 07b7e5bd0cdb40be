"""Sending a distributed checkpoint, weights and optimizer state, through many layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.fsdp import local_shard
from nemo_cosmos.parallel.stored_weights import read_whole_tensors, stored_dtypes, stored_shapes
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_step import Layout, Step, Trial, named_parameters, train_one_step

Roads = dict[str, dict[str, Layout]]
"""Layouts that one checkpoint passes through: each loads what the one before has saved, and saves it again."""


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


def travel(rank: int, folder: Path, trial: Trial, roads: Roads, references: Path, task: str) -> None:
    shapes = {name: weight.shape for name, weight in torch.load(references / f"{task}.pt")["first"].items()}
    for road, layouts in roads.items():
        previous: Path | None = None
        for where, layout in layouts.items():
            with startup.initialize(**layout.groups):
                step = train_one_step(trial, layout, shapes)
                if previous is not None:
                    forget(step)
                    loaded = dist_checkpointing.load(sharded_state(step, is_loading=True), str(previous))
                    for i, chunk in enumerate(step.chunks):
                        chunk.load_state_dict(loaded[f"chunk_{i}"])
                    step.optimizer.load_state_dict(loaded["optimizer"])
                previous = folder / road / where
                previous.mkdir(exist_ok=True, parents=True)
                dist_checkpointing.save(sharded_state(step, is_loading=False), str(previous))


def check_roads(
    trial: Trial, roads: Roads, num_ranks: int, references: Path, folder: Path, *, task: str = "videos"
) -> None:
    """What the first layout saves is compared with one rank's training, what the others save with what they loaded.

    Args:
        trial: The model.
        roads: By name.
        num_ranks: Of processes; roads of others are left out.
        references: Where `reference_steps` left one rank's.
        folder: For the processes.
        task: The trial's.
    """
    roads = {road: layouts for road, layouts in roads.items() if {x.num_ranks for x in layouts.values()} == {num_ranks}}
    run_ranks(travel, num_ranks, folder, trial, roads, references, task)
    trained = torch.load(references / f"{task}.pt")
    for road, layouts in roads.items():
        first, *others = (stored(folder / road / where) for where in layouts)
        for name, weight in trained["weights"].items():
            torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-5)
            moment = first[f"optimizer.state.exp_avg.{name}"]
            torch.testing.assert_close(moment, trained["moments"][name], rtol=0, atol=1e-6)
        for where, other in zip(list(layouts)[1:], others, strict=True):
            assert other.keys() == first.keys(), where
            for name, tensor in first.items():
                assert torch.equal(other[name], tensor), f"{road}, {where}: {name}"
