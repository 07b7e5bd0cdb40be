"""A run that torchrun starts, as clusters do it: NeMo then behaves otherwise than under Lightning's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cosmos.training.checkpoint import finished_checkpoints

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PROJECT = Path(__file__).parents[2]


def test_two_processes_train_and_save(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.unit.training.tiny_run", str(tmp_path / "run"), "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [*torchrun, *program],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "LOSSES" in done.stdout
    assert [path.name for path in finished_checkpoints(tmp_path / "run" / "checkpoints")] == ["step=0000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no files of a logger that nobody asked for
