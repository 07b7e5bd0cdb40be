"""The videos and pictures that a tokenizer is measured on: files of a folder, or held-out windows of curated clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nemo_cosmos.errors import user_error
from nemo_cosmos.steps.heldout import HeldOutWindow
from nemo_cosmos.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES, probe_video, read_image, stream_video


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video that can be read from its start again and again; a picture is a video of one frame."""

    name: str
    source: str
    """Domain."""
    probe: Callable[[], tuple[int, float]]
    """Number of frames, as far as known without decoding, and frames per second."""
    frames: Callable[[], Iterator[np.ndarray]]
    """uint8 [H, W, 3] one by one; raises `UserError` where the file is broken."""


def is_curated(folder: str | Path) -> bool:
    """Whether `nemo-cosmos curate` wrote a folder."""
    return any(Path(folder).glob("resolution_*/**/[!.]*.tar"))


def files_of(folder: str | Path, *, max_frames: int | None = None) -> list[VideoSource]:
    """Finds all videos and pictures below a folder, hidden ones left out, in the order of their paths.

    Args:
        folder: Where; a file's domain is the folder that it stands in.
        max_frames: Only so many frames of each.

    Raises:
        UserError: There is no such folder, or nothing in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise user_error("data", str(folder), "an existing folder", "Check the path.")
    if max_frames is not None and max_frames < 1:
        raise user_error("max_frames", max_frames, "at least 1", "Leave it out to take all frames.")
    found = [_source_of(path, folder, max_frames) for path in sorted(folder.rglob("*")) if _is_shown(path, folder)]
    sources = [source for source in found if source is not None]
    if not sources:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        expected = f"a folder with videos or pictures ({suffixes}), or one that `nemo-cosmos curate` wrote"
        raise user_error("data", str(folder), expected, "Put some there, or give another folder.")
    return sources


def windows_as_sources(windows: Iterable[HeldOutWindow]) -> list[VideoSource]:
    """Wraps held-out windows, named by domain and number."""
    return [
        VideoSource(
            name=f"{window.source} {number}",
            source=window.source,
            probe=partial(_length_of, window),
            frames=partial(iter, window.frames),
        )
        for number, window in enumerate(windows)
    ]


def _is_shown(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _source_of(path: Path, folder: Path, max_frames: int | None) -> VideoSource | None:
    name = str(path.relative_to(folder))
    domain = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
    if path.suffix.lower() in VIDEO_SUFFIXES:
        frames = partial(stream_video, path, max_frames=max_frames)
        return VideoSource(name=name, source=domain, probe=partial(_probe, path, max_frames), frames=frames)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return VideoSource(name=name, source=domain, probe=_picture_length, frames=partial(_picture, path))
    return None


def _probe(path: Path, max_frames: int | None) -> tuple[int, float]:
    num_frames, fps = probe_video(path)
    return (num_frames if max_frames is None else min(num_frames, max_frames)), fps


def _length_of(window: HeldOutWindow) -> tuple[int, float]:
    return len(window.frames), window.fps


def _picture_length() -> tuple[int, float]:
    return 1, 1.0


def _picture(path: Path) -> Iterator[np.ndarray]:
    yield read_image(path)
