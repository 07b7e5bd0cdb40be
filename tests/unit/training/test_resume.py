"""What a run that is started again does with the project's own data modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_cosmos.parallel import startup
from tests.unit.diffusion.tiny_run import run


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps of 4 samples."""
    folder = tmp_path_factory.mktemp("run")
    assert sorted(run(folder, steps=2)) == [1, 2]
    startup.shutdown()
    return folder


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (*folder.glob("metrics.*"), *folder.rglob("step=*/**/*"))}


def test_a_finished_run_is_left_as_it_is(two_steps: Path) -> None:
    before = _times(two_steps)
    assert run(two_steps, steps=2) == {}
    assert _times(two_steps) == before


def test_weights_to_start_from_are_not_read_again(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run", symlinks=True)
    assert sorted(run(tmp_path / "run", steps=3, init_from=str(tmp_path / "gone.safetensors"))) == [3]
    startup.shutdown()


def test_a_run_goes_on_with_another_global_batch_size(two_steps: Path) -> None:
    assert sorted(run(two_steps, steps=4, global_batch_size=2)) == [3, 4]
    startup.shutdown()
    assert sorted(run(two_steps, steps=5, global_batch_size=8)) == [5]
    rows = [json.loads(line) for line in (two_steps / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
