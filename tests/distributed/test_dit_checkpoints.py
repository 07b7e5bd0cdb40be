"""Distributed checkpoints of the DiT, weights and optimizer state, load in any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.dit_step import DIT
from tests.distributed.megatron_step import Layout
from tests.distributed.roads import check_roads

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


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_checkpoint_passes_through_all_layouts_unchanged(num_ranks: int, one_rank_steps: Path, tmp_path: Path) -> None:
    check_roads(DIT, ROADS, num_ranks, one_rank_steps, tmp_path)
