"""Runs of the DiT through Lightning with a pipeline train, save and go on as one process does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from tests.distributed.launch import run_ranks
from tests.unit.diffusion.tiny_run import run

pytestmark = pytest.mark.distributed

LAYOUTS = {"PP2": {"pp": 2}, "PP2 interleaved": {"pp": 2, "vp": 2}}
EMA_DECAY = 0.5


def _train(rank: int, meeting: Path, folder: Path, steps: int, sizes: dict[str, int]) -> None:
    run(folder, steps=steps, devices=2, ema_decay=EMA_DECAY, **sizes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a first step, and another process's second."""
    folder = tmp_path_factory.mktemp("one")
    for steps in (1, 2):
        run(folder, steps=steps, ema_decay=EMA_DECAY)
        startup.shutdown()
    return folder


def _figures(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def _assert_alike(got: Path, expected: Path) -> None:
    assert len(_figures(got)) == len(_figures(expected)) == 2
    for ours, theirs in zip(_figures(got), _figures(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for step in ("step=0000001", "step=0000002"):
        for use_ema in (False, True):
            ours, theirs = (read_whole(run / "checkpoints" / step, use_ema=use_ema) for run in (got, expected))
            assert set(ours) == set(theirs)
            for name, weight in theirs.items():
                torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pipeline_trains_saves_and_goes_on_like_one_process(name: str, one_process: Path, tmp_path: Path) -> None:
    two, back = tmp_path / "two", tmp_path / "back"
    run_ranks(_train, 2, tmp_path / "first", two, 1, LAYOUTS[name])
    shutil.copytree(two, back, symlinks=True)
    run_ranks(_train, 2, tmp_path / "second", two, 2, LAYOUTS[name])
    run(back, steps=2, ema_decay=EMA_DECAY)
    startup.shutdown()
    _assert_alike(two, one_process)
    _assert_alike(back, one_process)
