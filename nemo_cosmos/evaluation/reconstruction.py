"""Measuring a rebuilt video while it streams by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nemo_cosmos.contracts import Record
from nemo_cosmos.evaluation.clip_features import CLIP_FRAMES, ClipFeatures
from nemo_cosmos.evaluation.metrics import psnr, ssim
from nemo_cosmos.evaluation.perceptual import LpipsLike

PERCEPTUAL_CROP = 256
"""Pixels; LPIPS-like looks at no more than the middle of a frame, since it costs a hundred times what PSNR does."""


@dataclass(frozen=True, kw_only=True)
class SeamMeasures(Record):
    """Quality where windows meet, and elsewhere. A joint lies between a window's last frame and the next one's first.

    `change` compares how the picture changes from one frame to the next, as the PSNR of that change: a jump that the
    original does not have shows there, even where both frames are good. `step` is how much the quality itself changes:
    the mean absolute difference of the PSNR of neighbouring frames, so a picture that pulses shows there.
    """

    window_frames: int
    num_joints: int
    psnr_at_joints_db: float
    """Frames on either side of a joint."""
    psnr_elsewhere_db: float
    change_at_joints_db: float
    change_elsewhere_db: float
    step_at_joints_db: float
    step_elsewhere_db: float


@dataclass(frozen=True, kw_only=True)
class VideoMeasures(Record):
    """One rebuilt video, means over its frames."""

    name: str
    source: str
    num_frames: int
    height: int
    width: int
    psnr_db: float
    ssim: float
    lpips_like: float
    """Mean over the first, the middle and the last frame."""
    bits_per_pixel: float | None = None
    seams: SeamMeasures | None = None
    """None where no two windows meet."""


class VideoMeter:
    """Takes a video and its reconstruction in pieces.

    Args:
        num_frames: Length of the video; where fewer frames come, some of those that LPIPS-like would see are missing.
        perceptual: LPIPS-like.
        features: Describes clips for the Fréchet distance; None to leave it out.
        window_frames: Frames per window, for the seams.
    """

    def __init__(
        self, num_frames: int, *, perceptual: LpipsLike, features: ClipFeatures | None = None, window_frames: int = 17
    ) -> None:
        self.middle: tuple[np.ndarray, np.ndarray] | None = None
        """The middle frame and its reconstruction, uint8 [H, W, 3]."""
        self.features: list[tuple[np.ndarray, np.ndarray]] = []
        """Features of each whole clip of 16 frames, original and rebuilt; of a shorter video, of all its frames."""
        self._middle = num_frames // 2
        self._sparse = {0, self._middle, num_frames - 1}
        self._perceptual, self._describe, self._window = perceptual, features, window_frames
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._looked_at: list[tuple[np.ndarray, np.ndarray]] = []
        self._change: list[float] = []
        self._size = (0, 0)
        self._last_error: np.ndarray | None = None
        self._clip: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, truth: np.ndarray, rebuilt: np.ndarray) -> None:
        """Measures the next frames, uint8 [T, H, W, 3] both.

        Raises:
            UserError: Their shapes differ, or they are smaller than SSIM's window.
        """
        start = len(self._psnr)
        self._psnr += psnr(truth, rebuilt).tolist()
        self._ssim += ssim(truth, rebuilt).tolist()
        self._size = truth.shape[1:3]
        for number, (a, b) in enumerate(zip(truth, rebuilt, strict=True), start=start):
            self._add_change(a, b)
            if number in self._sparse:
                self._looked_at.append((_centre(a), _centre(b)))
            if number == self._middle:
                self.middle = (a, b)
            if self._describe is not None:
                self._clip.append((a, b))
                if len(self._clip) == CLIP_FRAMES:
                    self._end_clip()

    def finish(self, *, name: str, source: str, bits: float | None = None) -> VideoMeasures:
        """Sums up.

        Args:
            name: The video's.
            source: Its domain.
            bits: Of its code.

        Raises:
            UserError: The frames are smaller than LPIPS-like's 16 pixels.
        """
        if self._clip and not self.features:
            self._end_clip()
        height, width = self._size
        num_frames = len(self._psnr)
        truth, rebuilt = (np.stack(frames) for frames in zip(*self._looked_at, strict=True))
        return VideoMeasures(
            name=name,
            source=source,
            num_frames=num_frames,
            height=height,
            width=width,
            psnr_db=float(np.mean(self._psnr)),
            ssim=float(np.mean(self._ssim)),
            lpips_like=float(self._perceptual.frames(truth, [rebuilt]).mean()),
            bits_per_pixel=None if bits is None else bits / (num_frames * height * width),
            seams=self._seams(),
        )

    def _add_change(self, truth: np.ndarray, rebuilt: np.ndarray) -> None:
        error = rebuilt.astype(np.int16) - truth
        if self._last_error is not None:
            # As PSNR, with the change of the error in place of the error.
            mse = np.square(error - self._last_error, dtype=np.float32).mean(dtype=np.float64)
            self._change.append(float(10 * np.log10(255.0**2 / max(mse, 1e-5))))
        self._last_error = error

    def _end_clip(self) -> None:
        assert self._describe is not None, "clips are kept only where they are described"
        truth, rebuilt = (np.stack(frames) for frames in zip(*self._clip, strict=True))
        self.features.append((self._describe(truth), self._describe(rebuilt)))
        self._clip.clear()

    def _seams(self) -> SeamMeasures | None:
        changes = np.arange(1, len(self._psnr))
        crosses = changes % self._window == 0
        if not crosses.any():
            return None
        beside = np.zeros(len(self._psnr), bool)
        beside[changes[crosses]] = beside[changes[crosses] - 1] = True
        quality, change = np.array(self._psnr), np.array(self._change)
        step = np.abs(np.diff(quality))
        return SeamMeasures(
            window_frames=self._window,
            num_joints=int(crosses.sum()),
            psnr_at_joints_db=float(quality[beside].mean()),
            psnr_elsewhere_db=float(quality[~beside].mean()),
            change_at_joints_db=float(change[crosses].mean()),
            change_elsewhere_db=float(change[~crosses].mean()),
            step_at_joints_db=float(step[crosses].mean()),
            step_elsewhere_db=float(step[~crosses].mean()),
        )


def mean_seams(videos: Iterable[VideoMeasures]) -> SeamMeasures | None:
    """Averages over the videos that have joints, each by its number of joints; None where none has."""
    found = [video.seams for video in videos if video.seams is not None]
    if not found:
        return None
    weights = [seams.num_joints for seams in found]

    figures = (f"{what}_{where}_db" for what in ("psnr", "change", "step") for where in ("at_joints", "elsewhere"))
    means = {name: float(np.average([getattr(seams, name) for seams in found], weights=weights)) for name in figures}
    return SeamMeasures(window_frames=found[0].window_frames, num_joints=sum(weights), **means)


def _centre(frame: np.ndarray) -> np.ndarray:
    """Cuts the middle out of [H, W, 3]."""
    top, left = (max(0, (length - PERCEPTUAL_CROP) // 2) for length in frame.shape[:2])
    return frame[top : top + PERCEPTUAL_CROP, left : left + PERCEPTUAL_CROP]
