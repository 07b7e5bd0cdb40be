"""Collecting raw video: simulator rollouts in worker processes, and real clips."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import written_aside
from nemo_cosmos.simulation.packaged import collect_packaged
from nemo_cosmos.simulation.rollout import HELDOUT_SEED_START
from nemo_cosmos.simulation.writer import is_complete, read_sidecar, video_paths, write_rollout
from nemo_cosmos.video_io import VIDEO_SUFFIXES

MULTIVIEW_SEED_OFFSET = 500_000
"""Six-camera rollouts use seed + this and on, so that asking for more of the others never moves them."""


@dataclass(kw_only=True)
class CollectConfig:
    """How much to collect."""

    num_street: int = 40
    """Street rollouts with the front camera."""
    num_multiview: int = 3
    """Street rollouts with all six cameras."""
    num_arm: int = 40
    num_heldout_street: int = 8
    """Front camera; never trained on."""
    num_heldout_arm: int = 8
    frames: int = 65
    """Per rollout."""
    size: int = 256
    """Height and width in pixels; even."""
    fps: float = 10.0
    seed: int = 0
    """First training seed; held-out rollouts do not depend on it."""
    workers: int = 2
    """Processes."""

    def __post_init__(self) -> None:
        """Refuses what cannot be collected."""
        for name in ("num_street", "num_multiview", "num_arm", "num_heldout_street", "num_heldout_arm", "seed"):
            if getattr(self, name) < 0:
                raise user_error(name, getattr(self, name), "0 or more", "Correct it.")
        for name, least in (("frames", 2), ("size", 16), ("workers", 1)):
            if getattr(self, name) < least:
                raise user_error(name, getattr(self, name), f"{least} or more", "Correct it.")
        if self.size % 2 or self.size > 1024:
            raise user_error("size", self.size, "an even number up to 1024", "H.264 needs even sizes; try 256.")
        if self.fps <= 0:
            raise user_error("fps", self.fps, "more than 0", "The tiny models use 10.")
        if self.seed + max(self.num_street, self.num_arm, self.num_multiview) > MULTIVIEW_SEED_OFFSET:
            expected = f"seed + number of rollouts up to {MULTIVIEW_SEED_OFFSET}"
            raise user_error("seed", self.seed, expected, "Seeds above are kept for other uses; take a smaller seed.")


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection holds."""

    videos: dict[str, int]
    """Files by source."""
    written: int
    """Files made by this call."""
    skipped: int
    """Files that an earlier call had completed."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: str
    name: str
    seed: int
    cameras: tuple[str, ...]
    frames: int
    size: int
    fps: float


def collect(output_dir: str | Path, config: CollectConfig, videos: str | Path | None = None) -> CollectSummary:
    """Fills `output_dir` with `<source>/<name>.mp4` and sidecars; what is complete already is left alone.

    Args:
        output_dir: Root of the collection.
        config: How much.
        videos: Folder of the user's own videos, which take the place of the packaged clips.

    Raises:
        UserError: A package or OpenGL library is missing, `videos` holds no video, or the disk is full.
    """
    from nemo_cosmos.simulation.arm import require_metaworld
    from nemo_cosmos.simulation.rendering import choose_gl

    output_dir = Path(output_dir)
    jobs = list(_jobs(config))
    if jobs:
        choose_gl()
    if any(job.source == "arm" for job in jobs):
        require_metaworld()
    own = None if videos is None else find_videos(Path(videos))
    real, skipped = collect_packaged(output_dir) if own is None else _copy_videos(output_dir, Path(videos), own)
    counts = {"packaged" if own is None else "own": len(real)}
    open_jobs = []
    for job in jobs:
        files = video_paths(output_dir, job.source, job.name, job.cameras).values()
        counts[job.source] = counts.get(job.source, 0) + len(files)
        if all(_is_done(file, job) for file in files):
            skipped += len(files)
        else:
            open_jobs.append(job)
    _run_jobs(output_dir, open_jobs, config.workers)
    return CollectSummary(videos=counts, written=sum(counts.values()) - skipped, skipped=skipped)


def _is_done(video: Path, job: _Job) -> bool:
    """Whether an earlier call made this file, and made it to the same measure."""
    if not is_complete(video):
        return False
    record = read_sidecar(video)
    intrinsics = record.conditions.intrinsics
    size = None if intrinsics is None else round(2 * intrinsics[0][2])
    return (record.num_frames, record.fps, size) == (job.frames, job.fps, job.size)


def find_videos(folder: Path) -> list[Path]:
    """Lists the videos under a folder, sorted, but for hidden files.

    Empty and broken ones are listed too: curation records why it rejects them.

    Raises:
        UserError: The folder is missing or holds none.
    """
    if not folder.is_dir():
        raise user_error("videos", str(folder), "a folder", "Check the path.")
    found = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not found:
        expected = f"a folder with videos ({', '.join(sorted(VIDEO_SUFFIXES))})"
        raise user_error("videos", str(folder), expected, "Put videos there, or leave the option out.")
    return found


def _copy_videos(output_dir: Path, folder: Path, own: list[Path]) -> tuple[list[Path], int]:
    """Copies the user's videos, and sidecars where they have some, to `<output_dir>/own`."""
    copies, skipped = [], 0
    for video in own:
        copy = output_dir / "own" / video.relative_to(folder)
        copies.append(copy)
        if copy.is_file() and copy.stat().st_size == video.stat().st_size:
            skipped += 1
            continue
        for origin, target in ((video.with_suffix(".json"), copy.with_suffix(".json")), (video, copy)):
            if origin.is_file():
                with written_aside(target) as aside:
                    shutil.copyfile(origin, aside)
    return copies, skipped


def _jobs(config: CollectConfig) -> Iterator[_Job]:
    """Lists the rollouts, long ones first so that no worker is left alone with one at the end."""
    from nemo_cosmos.simulation.town_scene import CAMERAS

    shape = {"frames": config.frames, "size": config.size, "fps": config.fps}
    plan = (
        ("street", "street6", config.seed + MULTIVIEW_SEED_OFFSET, config.num_multiview, tuple(CAMERAS)),
        ("street", "street", config.seed, config.num_street, ("front",)),
        ("arm", "arm", config.seed, config.num_arm, ("side",)),
        ("street", "street", HELDOUT_SEED_START, config.num_heldout_street, ("front",)),
        ("arm", "arm", HELDOUT_SEED_START, config.num_heldout_arm, ("side",)),
    )
    for source, prefix, first, count, cameras in plan:
        for seed in range(first, first + count):
            yield _Job(source=source, name=f"{prefix}_{seed:07d}", seed=seed, cameras=cameras, **shape)


def _run_jobs(output_dir: Path, jobs: list[_Job], workers: int) -> None:
    """Runs the jobs in spawned processes; the first failure cancels those not begun."""
    from tqdm import tqdm

    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool,
        tqdm(total=len(jobs), desc="collect", unit="rollout") as progress,
    ):
        futures = [pool.submit(_run_job, output_dir, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BrokenProcessPool as error:
            raise UserError(
                "collect: a rendering process was killed, most likely for want of memory. "
                "Run again with fewer workers; finished rollouts are kept."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_job(output_dir: Path, job: _Job) -> None:
    from nemo_cosmos.simulation import arm, street
    from nemo_cosmos.simulation.rendering import choose_gl

    choose_gl()
    shape = {"name": job.name, "num_frames": job.frames, "size": job.size, "fps": job.fps}
    if job.source == "street":
        rollout = street.roll_out(job.seed, cameras=job.cameras, **shape)
    else:
        rollout = arm.roll_out(job.seed, **shape)
    write_rollout(output_dir, rollout)
