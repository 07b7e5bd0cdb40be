"""A training step of the DiT in every layout equals the step on one rank: loss, every gradient, every weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.dit_step import DIT
from tests.distributed.layouts_equal import check_layouts
from tests.distributed.megatron_step import Layout

pytestmark = pytest.mark.distributed

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
RING, GATHER = {"cp_comm_type": "p2p"}, {"cp_comm_type": "all_gather"}

LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "TP2 SP full recompute": Layout(tensor=2, sequence_parallel=True, overrides=FULL),
    "PP2": Layout(pipeline=2),
    "PP2 interleaved": Layout(pipeline=2, virtual=2),
    "PP2 fixed positions": Layout(pipeline=2, task="no actions, fixed positions"),
    "PP2 distributed optimizer": Layout(pipeline=2, distributed_optimizer=True),
    "TP2 tokens": Layout(tensor=2, task="tokens"),
    "TP2 SP tokens": Layout(tensor=2, sequence_parallel=True, task="tokens"),
    "PP2 tokens": Layout(pipeline=2, task="tokens"),
    "CP2 tokens": Layout(context=2, task="tokens"),
    "CP2 tokens of images": Layout(context=2, task="tokens of images"),
    "CP2": Layout(context=2),
    "CP2 ring": Layout(context=2, overrides=RING),
    "CP2 ring selective recompute": Layout(context=2, overrides={**RING, **SELECTIVE}),
    "CP2 all-gather": Layout(context=2, overrides=GATHER),
    "CP2 images": Layout(context=2, task="images"),
    "CP2 three images": Layout(context=2, task="three images"),
    "CP2 images recompute": Layout(context=2, task="images", overrides=FULL),
    "DP2": Layout(data=2),
    "DP2 distributed optimizer": Layout(data=2, distributed_optimizer=True),
    "DP2 FSDP": Layout(data=2, fsdp=True),
    "DP2 FSDP full recompute": Layout(data=2, fsdp=True, overrides=FULL),
    "CP2 FSDP": Layout(context=2, fsdp=True),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "TP2 SP PP2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "TP2 SP CP2": Layout(tensor=2, context=2, sequence_parallel=True),
    "TP2 SP CP2 ring": Layout(tensor=2, context=2, sequence_parallel=True, overrides=RING),
    "TP2 SP CP2 images": Layout(tensor=2, context=2, sequence_parallel=True, task="images"),
    "CP4 ring": Layout(context=4, overrides=RING),
    "CP4 all-to-all": Layout(context=4, overrides={"cp_comm_type": "a2a"}),
    "PP2 CP2 images": Layout(pipeline=2, context=2, task="images"),
    "TP2 DP2 distributed optimizer": Layout(tensor=2, data=2, distributed_optimizer=True),
    "PP2 DP2 distributed optimizer": Layout(pipeline=2, data=2, distributed_optimizer=True, task="few layers"),
    "PP2 CP2 distributed optimizer": Layout(pipeline=2, context=2, distributed_optimizer=True, task="few layers"),
    "TP2 SP DP2 FSDP": Layout(tensor=2, data=2, sequence_parallel=True, fsdp=True),
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_equal_one_rank(num_ranks: int, one_rank_steps: Path, tmp_path: Path) -> None:
    check_layouts(DIT, LAYOUTS, num_ranks, one_rank_steps, tmp_path)
