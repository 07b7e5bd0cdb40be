"""A run through Lightning with an interleaved pipeline: every process holds two chunks of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_cosmos.parallel import startup
from nemo_cosmos.training.load import read_whole
from tests.distributed.launch import run_ranks
from tests.unit.diffusion.tiny_run import run

pytestmark = pytest.mark.distributed


def _interleaved(rank: int, meeting: Path, folder: Path, steps: int) -> None:
    run(folder, steps=steps, devices=2, pp=2, vp=2, ema_decay=0.5)


def _figures(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_an_interleaved_pipeline_trains_saves_and_goes_on_like_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for steps in (1, 2):
        run(one, steps=steps, ema_decay=0.5)
        startup.shutdown()
        run_ranks(_interleaved, 2, tmp_path / f"meeting_{steps}", two, steps)
        assert len(_figures(two)) == steps
        for got, expected in zip(_figures(two), _figures(one), strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
        for use_ema in (False, True):
            weights, expected = (
                read_whole(folder / "checkpoints" / f"step={steps:07d}", use_ema=use_ema) for folder in (two, one)
            )
            assert set(weights) == set(expected)
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)
