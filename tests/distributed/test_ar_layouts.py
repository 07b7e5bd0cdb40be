"""A training step of the autoregressive transformer in every layout equals the step on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ar_step import AR
from tests.distributed.layouts_equal import check_layouts
from tests.distributed.megatron_step import Layout
from tests.distributed.roads import check_roads

pytestmark = pytest.mark.distributed

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
RING, GATHER = {"cp_comm_type": "p2p"}, {"cp_comm_type": "all_gather"}

LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2 SP full recompute": Layout(tensor=2, sequence_parallel=True, overrides=FULL),
    "TP2 SP tied": Layout(tensor=2, sequence_parallel=True, task="tied"),
    "PP2": Layout(pipeline=2),
    "PP2 tied": Layout(pipeline=2, task="tied"),
    "PP2 interleaved": Layout(pipeline=2, virtual=2),
    "PP2 interleaved tied distributed optimizer": Layout(
        pipeline=2, virtual=2, distributed_optimizer=True, task="tied"
    ),
    "CP2": Layout(context=2),
    "CP2 ring tied": Layout(context=2, overrides=RING, task="tied"),
    "CP2 all-gather tied": Layout(context=2, overrides=GATHER, task="tied"),
    "DP2": Layout(data=2),
    "DP2 distributed optimizer": Layout(data=2, distributed_optimizer=True),
    "TP2 SP actions": Layout(tensor=2, sequence_parallel=True, task="actions"),
    "CP2 actions": Layout(context=2, task="actions"),
    "TP2 SP PP2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "TP2 SP CP2": Layout(tensor=2, context=2, sequence_parallel=True),
    "TP2 SP CP2 ring tied": Layout(tensor=2, context=2, sequence_parallel=True, overrides=RING, task="tied"),
    "CP4 ring tied": Layout(context=4, overrides=RING, task="tied"),
    "CP4 all-to-all": Layout(context=4, overrides={"cp_comm_type": "a2a"}),
    "PP2 CP2 tied distributed optimizer": Layout(pipeline=2, context=2, distributed_optimizer=True, task="tied"),
    "TP2 DP2 distributed optimizer": Layout(tensor=2, data=2, distributed_optimizer=True),
}

ROADS = {
    "videos": {
        "plain optimizer": {
            "TP2": Layout(tensor=2),
            "PP2 interleaved": Layout(pipeline=2, virtual=2),
            "CP2": Layout(context=2),
        },
        "distributed optimizer": {
            "DP2": Layout(data=2, distributed_optimizer=True),
            "TP2 SP": Layout(tensor=2, sequence_parallel=True, distributed_optimizer=True),
            "PP2": Layout(pipeline=2, distributed_optimizer=True),
        },
    },
    "tied": {
        "plain optimizer": {
            "PP2": Layout(pipeline=2, task="tied"),
            "TP2": Layout(tensor=2, task="tied"),
        },
        "distributed optimizer": {
            "DP2": Layout(data=2, distributed_optimizer=True, task="tied"),
            "PP2": Layout(pipeline=2, distributed_optimizer=True, task="tied"),
            "TP2": Layout(tensor=2, distributed_optimizer=True, task="tied"),
        },
    },
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_equal_one_rank(num_ranks: int, one_rank_ar_steps: Path, tmp_path: Path) -> None:
    check_layouts(AR, LAYOUTS, num_ranks, one_rank_ar_steps, tmp_path)


@pytest.mark.parametrize("task", ROADS)
def test_checkpoint_passes_through_all_layouts_unchanged(task: str, one_rank_ar_steps: Path, tmp_path: Path) -> None:
    check_roads(AR, ROADS[task], 2, one_rank_ar_steps, tmp_path, task=task)
