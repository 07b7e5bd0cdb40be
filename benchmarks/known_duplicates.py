"""Real clips and changed copies of them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from curator_stages.decode import decode_span, probe
from curator_stages.shots import ContentDetector
from nemo_cosmos.simulation.packaged import collect_packaged

FPS = 25.0
_LONGEST = 40
"""Frames of a clip."""
_LARGEST = 480
"""Longer side in pixels of the originals."""


@dataclass(frozen=True, kw_only=True)
class KnownClip:
    """A clip and what it was made from."""

    original: int
    """Number of the clip that it is a copy of, or its own."""
    change: str
    """One of `CHANGES`, or `original`."""
    frames: np.ndarray
    """uint8 RGB [T, H, W, 3]."""
    crf: int
    """Of x264, to encode it with."""


def known_clips(most: int) -> Iterator[KnownClip]:
    """Gives originals, each followed by its copies.

    The originals are the shots of a second and more of the clips that installed packages carry, those of one film in
    large part: distinct clips of the same people and places are among them.
    """
    for number, frames in enumerate(itertools.islice(_shots(), most)):
        yield KnownClip(original=number, change="original", frames=frames, crf=18)
        for change, (changed, crf) in CHANGES.items():
            yield KnownClip(original=number, change=change, frames=np.stack([changed(f) for f in frames]), crf=crf)


def _shots() -> Iterator[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(collect_packaged(Path(folder))[0]):
            info, (height, width) = probe(path), _stored_size(path)
            frames = decode_span(path, start_frame=0, end_frame=None, fps=info.fps, size=(height, width)).frames
            cuts = ContentDetector(27.0).cuts(frames, info.fps)
            for start, end in itertools.pairwise([0, *cuts, len(frames)]):
                if end - start >= FPS:
                    yield np.stack(frames[start : min(end, start + _LONGEST)])


def _stored_size(path: Path) -> tuple[int, int]:
    first = decode_span(path, start_frame=0, end_frame=1, fps=FPS, size=(16, 16))
    scale = min(1.0, _LARGEST / max(first.source_height, first.source_width))
    height, width = (2 * round(scale * side / 2) for side in (first.source_height, first.source_width))
    return height, width


def _same(frame: np.ndarray) -> np.ndarray:
    return frame


def _smaller(frame: np.ndarray) -> np.ndarray:
    height, width = (side // 4 * 2 for side in frame.shape[:2])
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


def _cropped(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def changed(frame: np.ndarray) -> np.ndarray:
        height, width = (2 * round(share * side / 2) for side in frame.shape[:2])
        top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
        return frame[top : top + height, left : left + width]

    return changed


def _corner(frame: np.ndarray) -> np.ndarray:
    """Crops at the right and at the bottom only."""
    height, width = (2 * round(0.9 * side / 2) for side in frame.shape[:2])
    return frame[:height, :width]


def _recoloured(frame: np.ndarray) -> np.ndarray:
    """Warmer, paler and with less contrast."""
    grey = frame.mean(axis=-1, keepdims=True)
    pale = grey + 0.6 * (frame - grey)
    return np.clip(0.8 * pale * (1.1, 1.0, 0.85) + 24, 0, 255).astype(np.uint8)


def _all(frame: np.ndarray) -> np.ndarray:
    return _smaller(_recoloured(_cropped(0.9)(frame)))


CHANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "crf 28": (_same, 28),
    "crf 33": (_same, 33),
    "crf 38": (_same, 38),
    "half the size": (_smaller, 23),
    "recoloured": (_recoloured, 23),
    "cropped to 95%": (_cropped(0.95), 23),
    "cropped to 90%": (_cropped(0.9), 23),
    "cropped to 85%": (_cropped(0.85), 23),
    "cropped to 80%": (_cropped(0.8), 23),
    "corner of 90%": (_corner, 23),
    "all three, 90%": (_all, 30),
}
"""What is done to a frame, and the rate factor of the copy."""
