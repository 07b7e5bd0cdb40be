"""Packs of clips, batches of pictures and averages of the weights train on two ranks as on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.training.ema import EMA
from tests.distributed.launch import run_ranks
from tests.distributed.same import assert_same
from tests.unit.diffusion.tiny_run import AlternatingLatents, PackedLatents, run

pytestmark = pytest.mark.distributed

STEPS = 2
LAYOUTS = {
    "packed_tp2_sp": (PackedLatents, {"tp": 2, "sp": True}),
    "packed_pp2": (PackedLatents, {"pp": 2}),
    "packed_pp2_interleaved": (PackedLatents, {"pp": 2, "vp": 2}),
    "packed_fsdp": (PackedLatents, {"fsdp": "pytorch"}),
    "packed_dp2": (PackedLatents, {}),
    "packed_cp2": (PackedLatents, {"cp": 2}),
    "alternating_cp2": (AlternatingLatents, {"cp": 2}),
}


def _train(rank: int, folder: Path) -> None:
    for name, (data, layout) in LAYOUTS.items():
        average = EMA(power=1.0)
        run(folder / name, steps=STEPS, data=data, devices=2, callbacks=[average], **layout)
        whole = sum(shard.shape.numel() for shard in average._shards.values())
        torch.save((sum(a.numel() for a in average._shadow.values()), whole), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for data in (PackedLatents, AlternatingLatents):
        run(folder / data.__name__, steps=STEPS, data=data, callbacks=[EMA(power=1.0)])
        startup.shutdown()
    run_ranks(_train, 2, folder)
    return folder


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_like_one(runs: Path, name: str) -> None:
    expected = _rows(runs / LAYOUTS[name][0].__name__)
    for got, row in zip(_rows(runs / name), expected, strict=True):
        for figure in ("loss", "grad_norm", "lr"):
            # Sums over ranks are in another order, and float32 keeps 1.2e-7.
            assert got[figure] == pytest.approx(row[figure], rel=5e-6), (row["step"], figure)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_average_like_one(runs: Path, name: str) -> None:
    place = Path("checkpoints") / f"step={STEPS:07d}"
    expected, got = read_whole(runs / LAYOUTS[name][0].__name__ / place), read_whole(runs / name / place)
    assert set(got) == set(expected)
    for weight, value in expected.items():
        # Adam divides by the root of small second moments, which magnifies the rounding of gradients.
        assert_same(weight, got[weight], value, relative=2e-5, floor=2e-6)


@pytest.mark.parametrize("name", ["packed_dp2", "alternating_cp2"])
def test_each_rank_averages_its_part_of_the_weights(runs: Path, name: str) -> None:
    """What the optimizer shares out, over data- and context-parallel ranks, the average does too."""
    parts = [torch.load(runs / f"{name}_{rank}.pt") for rank in range(2)]
    own, whole = [part for part, _ in parts], parts[0][1]
    assert sum(own) == whole
    assert max(own) < 0.6 * whole
