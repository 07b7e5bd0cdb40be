"""Kills curation runs at random moments, lets them go on, and compares the result with that of a run left alone.

python -m tests.unit.curator_stages.kill_many_times FOLDER --kills 20 --workers 2
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

from curator_stages.config import CurationConfig
from curator_stages.pipeline import curate
from curator_stages.stages.reader import plan_spans
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import SIZE, moving_texture, simulated_video, write_simulated

CONFIG = CurationConfig(captioner="none", height=SIZE, width=SIZE, min_s=0.5, max_s=1.0, embed_frames=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, fork = random.Random(args.seed), multiprocessing.get_context("fork")
    videos, output = args.folder / "in", args.folder / "killed"
    write_videos(videos)
    for name in ("torch", "cv2", "scenedetect", "faiss", "webdataset", "matplotlib.figure"):
        importlib.import_module(name)  # before the processes part, so that they spend their lives on work
    started = time.monotonic()
    finish(run(fork, videos, args.folder / "whole", args.workers))
    whole_s = time.monotonic() - started
    expected = outputs(args.folder / "whole")
    kills = finished = 0
    places: list[str] = []
    while kills < args.kills:
        process = run(fork, videos, output, args.workers)
        process.join(rng.uniform(0, whole_s))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            places.append(where(output))
        else:  # the run ended first: it is compared, and the next one begins anew
            finish(process)
            compare(expected, output, videos)
            finished += 1
            shutil.rmtree(output)
    finish(run(fork, videos, output, args.workers))
    compare(expected, output, videos)
    print(f"{kills} kills after {', '.join(places)}; {finished + 1} finished runs, all as the one left alone")


def write_videos(folder: Path) -> None:
    for i in range(8):
        write_video(folder / "real" / f"{i}.mp4", moving_texture(30, seed=i), fps=10)
        write_simulated(folder / "street", f"drive_{i}", simulated_video(20, rollout=f"drive_{i}"), seed=20 + i)
    shutil.copy(folder / "real" / "0.mp4", folder / "real" / "copy.mp4")
    (folder / "real" / "broken.mp4").write_bytes(b"")


def run(fork: multiprocessing.context.ForkContext, videos: Path, output: Path, workers: int) -> multiprocessing.Process:
    process = fork.Process(target=_curate, args=(videos, output, workers))
    process.start()
    return process


def finish(process: multiprocessing.Process) -> None:
    process.join()
    assert process.exitcode == 0, "the run failed"


def _curate(videos: Path, output: Path, workers: int) -> None:
    from curator_stages import executor

    executor.InProcessExecutor._num_workers = lambda self, num_tasks: workers  # few tiny videos would get one
    curate(videos, output, CONFIG, progress=False)


def where(output: Path) -> str:
    """How far a killed run had come."""
    spans = len(list((output / ".work" / "spans").glob("[!.]*")))
    return f"{spans} spans" + (", shards" if (output / "manifest.parquet").exists() else "")


def compare(expected: dict[str, bytes], output: Path, videos: Path) -> None:
    assert outputs(output) == expected
    spans = sorted(path.name for path in (output / ".work" / "spans").iterdir())
    assert spans == sorted(span.key for span in plan_spans(videos, output, CONFIG)), "left behind or lost"
    hidden = [path.name for path in output.rglob(".*.part*")]
    assert not hidden, hidden


def outputs(folder: Path) -> dict[str, bytes]:
    files = [folder / "manifest.parquet", *folder.glob("resolution_*/**/*.tar")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
