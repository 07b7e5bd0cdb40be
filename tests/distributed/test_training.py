"""A run through Lightning moves between one process and two, in every layout, as if it had never moved.

One process trains for 6 steps and saves at 2, 4 and 6. Two processes go on from step 2 in each layout; one process goes
on from the step 4 that each of them saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nemo_cosmos.parallel import startup
from nemo_cosmos.training.load import load_weights
from tests.distributed.averages import KeepAverages
from tests.distributed.launch import run_ranks
from tests.unit.training.tiny_run import run, tiny_config, tiny_gpt

pytestmark = pytest.mark.distributed

LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"async_save": True}}
RUN = {"steps": 6, "dropout": 0.0, "keep": -1, "ema_decay": 0.9}
TOLERANCE = 2e-6
"""Relative; sums over ranks are in another order, and float32 keeps 1.2e-7."""


def _go_on_in_every_layout(rank: int, folder: Path) -> None:
    for name, sizes in LAYOUTS.items():
        run(folder / name, devices=2, callbacks=[KeepAverages(folder / name / "averages", 6)], **RUN, **sizes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with the runs `one`, `tp2`, `pp2` and `dp2`."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "one", **RUN)
    startup.shutdown()
    for name in LAYOUTS:
        _copy_up_to(2, folder / "one", folder / name)
    run_ranks(_go_on_in_every_layout, 2, folder)
    return folder


def _copy_up_to(step: int, origin: Path, copy: Path) -> None:
    (copy / "checkpoints").mkdir(parents=True)
    for saved in range(2, step + 1, 2):
        name = f"step={saved:07d}"
        shutil.copytree(origin / "checkpoints" / name, copy / "checkpoints" / name)


def _rows(folder: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_go_on_like_one(runs, name):
    expected, got = _rows(runs / "one"), _rows(runs / name)
    assert sorted(got) == [3, 4, 5, 6]
    for step, row in got.items():
        for figure in ("loss", "grad_norm", "lr"):
            assert row[figure] == pytest.approx(expected[step][figure], rel=TOLERANCE), (step, figure)


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_two_processes_saved_loads_into_one(runs, name, use_ema):
    with startup.initialize():
        expected, got = tiny_gpt(tiny_config()), tiny_gpt(tiny_config())
        load_weights(expected, runs / "one" / "checkpoints" / "step=0000006", use_ema=use_ema)
        load_weights(got, runs / name / "checkpoints" / "step=0000006", use_ema=use_ema)
        for a, b in zip(expected.parameters(), got.parameters(), strict=True):
            # Adam divides by the root of small second moments, which magnifies the rounding of gradients.
            torch.testing.assert_close(b, a, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_can_compute_with_the_averages(runs, name):
    with startup.initialize():
        expected, got = tiny_gpt(tiny_config()), tiny_gpt(tiny_config())
        load_weights(expected, runs / name / "checkpoints" / "step=0000006")
        load_weights(got, runs / name / "averages")
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_goes_on_from_two(runs, name, tmp_path):
    _copy_up_to(4, runs / name, tmp_path / name)
    losses = run(tmp_path / name, **RUN)
    startup.shutdown()
    expected = _rows(runs / "one")
    assert losses == {step: pytest.approx(expected[step]["loss"], rel=TOLERANCE) for step in (5, 6)}


def _run_until_killed(folder: Path) -> None:
    os.environ.pop("MASTER_PORT", None)  # inherited; the process that made it may still listen there
    run(folder, kill_after=5, **RUN)


def test_a_killed_process_is_gone_on_from(runs, tmp_path):
    killed = multiprocessing.get_context("forkserver").Process(target=_run_until_killed, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    losses = run(tmp_path, **RUN)
    startup.shutdown()
    expected = _rows(runs / "one")
    assert losses == {5: expected[5]["loss"], 6: expected[6]["loss"]}
    assert {step: row["loss"] for step, row in _rows(tmp_path).items()} == {s: r["loss"] for s, r in expected.items()}
