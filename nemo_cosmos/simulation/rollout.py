"""What a simulator hands to the writer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_cosmos.contracts import CaptionWindow, Split

HELDOUT_SEED_START = 1_000_000
"""Held-out rollouts use this seed and those after it; training seeds stay below it."""

WINDOW_FRAMES = 16
"""Length of a caption window."""


@dataclass(frozen=True, kw_only=True)
class CameraTrack:
    """What one camera saw."""

    frames: np.ndarray
    """uint8 RGB [T, H, W, 3]."""
    poses: np.ndarray
    """[T, 4, 4]; camera-to-world, OpenCV axes, metres."""
    intrinsics: np.ndarray
    """[3, 3]; pixels; column c covers [c, c + 1)."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One run of a simulator seen by one or more synchronized cameras."""

    source: str
    """`street` or `arm`."""
    name: str
    seed: int
    fps: float
    captions: tuple[CaptionWindow, ...]
    actions: np.ndarray
    """[T-1, 7]; see `nemo_cosmos.contracts.ACTION_DIM`."""
    controls: np.ndarray
    """[T-1, any]; the simulator's commands."""
    body_poses: np.ndarray
    """[T, 4, 4]; car body or hand to world; not written, since actions and camera poses tell it."""
    cameras: dict[str, CameraTrack]

    @property
    def split(self) -> Split:
        """`heldout` for seeds of the held-out range."""
        return "heldout" if self.seed >= HELDOUT_SEED_START else "train"

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.body_poses)


def caption_spans(num_frames: int) -> list[tuple[int, int]]:
    """Cuts T frames into windows of `WINDOW_FRAMES`; the last one takes the remainder.

    Returns:
        Pairs of first frame and one past the last.
    """
    starts = list(range(0, max(num_frames - WINDOW_FRAMES + 1, 1), WINDOW_FRAMES))
    return list(zip(starts, [*starts[1:], num_frames], strict=True))
