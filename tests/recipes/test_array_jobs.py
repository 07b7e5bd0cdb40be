"""An array job's shares together are the work of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fiddle
import numpy as np
import pytest
from nemo_curator.tasks import Task

from curator_stages.executor import InProcessExecutor
from curator_stages.workers import WorkerPool
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import write_video
from recipes.array_jobs import array_place, curate_part
from recipes.launch import configure


def write_moving_square(path: Path, seed: int) -> None:
    """A textured square that crosses a textured ground in 20 frames."""
    rng = np.random.default_rng(seed)
    ground = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    square = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    frames = np.repeat(ground[None], 20, axis=0)
    for t in range(20):
        frames[t, 2 * t : 2 * t + 16, 2 * t : 2 * t + 16] = square
    write_video(path, frames, fps=10.0)


def take_place(monkeypatch: pytest.MonkeyPatch, part: int, num_parts: int) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(part))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(num_parts))


def test_parts_joined_equal_one_curation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    for name, seed in (("a/one", 1), ("a/two", 2), ("b/three", 3)):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        write_moving_square(raw / f"{name}.mp4", seed)
    whole, joined = tmp_path / "whole", tmp_path / "joined"
    small = ["config.height=64", "config.width=64", "config.motion_pairs=2", "config.embed_frames=1"]
    expected = fiddle.build(configure("curate", [f"input_dir={raw}", f"output_dir={whole}", *small]))()

    config = fiddle.build(configure("curate_part", small).config)
    worked_on = []
    for part in (1, 0, 1):
        take_place(monkeypatch, part, 2)
        worked_on.append(curate_part(raw, joined, config))
    assert sum(worked_on) == 3
    assert worked_on[2] == 0
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    spans = sorted(path.name for path in (joined / ".work" / "spans").iterdir())
    before = {name: (joined / ".work" / "spans" / name).stat().st_mtime_ns for name in spans}
    summary = fiddle.build(configure("curate", [f"input_dir={raw}", f"output_dir={joined}", *small]))()

    assert (summary.num_clips, summary.num_kept) == (expected.num_clips, expected.num_kept)
    assert summary.num_kept > 0
    assert {name: (joined / ".work" / "spans" / name).stat().st_mtime_ns for name in spans} == before
    assert shards(joined) == shards(whole)


def test_a_piece_that_kills_its_worker_twice_is_left_to_the_next_call_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("bad", 1), ("good", 2)):
        (tmp_path / "raw").mkdir(exist_ok=True)
        write_moving_square(tmp_path / "raw" / f"{name}.mp4", seed)
    small = ["config.height=64", "config.width=64", "config.motion_pairs=2", "config.embed_frames=1"]
    config = fiddle.build(configure("curate_part", small).config)
    run = WorkerPool.run

    def run_and_lose_one(self: WorkerPool, tasks: Sequence[Task], done: Callable[[], object]) -> Iterator[Task]:
        bad = [task for task in tasks if "bad" in task.data.path]
        for task in bad:
            self._lose(task, "its worker was killed by SIGKILL, twice")
        yield from run(self, [task for task in tasks if task not in bad], done)

    monkeypatch.setattr(WorkerPool, "run", run_and_lose_one)
    monkeypatch.setattr(InProcessExecutor, "_num_workers", lambda *_: 2)
    assert curate_part(tmp_path / "raw", tmp_path / "out", config) == 1
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / ".work" / "spans").glob("*/failed"))) == 1
    made = [f"input_dir={tmp_path / 'raw'}", f"output_dir={tmp_path / 'out'}", *small]
    summary = fiddle.build(configure("curate", made))()
    # Two squares that move may be near-duplicates of each other.
    assert summary.num_clips == 2 and set(summary.rejected) <= {"semantic_dedup"}


def shards(curated: Path) -> dict[str, bytes]:
    return {str(p.relative_to(curated)): p.read_bytes() for p in curated.glob("resolution_*/**/*.tar")}


def test_place_outside_an_array_is_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    assert array_place() == (0, 1)


def test_array_not_numbered_from_zero_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    take_place(monkeypatch, 8, 8)
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID: got 8, expected 0 to 7. Submit with --array=0-7"):
        array_place()
