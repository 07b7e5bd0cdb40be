"""From decoded frames to upright RGB pictures, scaled and converted by FFmpeg in one go."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from curator_stages.source_frames import SourceFrame


class Scaler:
    """Makes pictures of one size; kept for many frames, since FFmpeg's scaler costs more to set up than to run."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        """Takes the height and width in pixels; None keeps the source's."""
        self._size = size
        self._reformatter = VideoReformatter()

    def picture(self, frame: SourceFrame) -> np.ndarray:
        """Returns a view, uint8 RGB [H, W, 3], upright; scaled to cover the size (area filter), the centre of that."""
        height, width = self._size or upright_size(frame)
        cover_height, cover_width, shrinks = _cover(upright_size(frame), (height, width))
        lying = frame.quarter_turns % 2 == 1
        scaled = self._reformatter.reformat(
            frame.frame,
            width=cover_height if lying else cover_width,
            height=cover_width if lying else cover_height,
            format="rgb24",
            interpolation=Interpolation.AREA if shrinks else Interpolation.BICUBIC,
            threads=1,  # workers share the cores by tasks
        )
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        upright = np.rot90(_pixels(scaled), k=frame.quarter_turns)
        return upright[top : top + height, left : left + width]


def upright_size(frame: SourceFrame) -> tuple[int, int]:
    """Returns height and width of the picture once it is turned."""
    height, width = frame.frame.height, frame.frame.width
    return (width, height) if frame.quarter_turns % 2 else (height, width)


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """Returns a view of an rgb24 frame, [H, W, 3]."""
    lines = np.frombuffer(memoryview(frame.planes[0]), np.uint8).reshape(frame.height, -1)  # each padded at its end
    return lines[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _cover(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int, bool]:
    """Returns the smallest height and width of the old shape that cover the new ones, and whether that is smaller."""
    scale = max(new[0] / old[0], new[1] / old[1])
    return max(new[0], round(old[0] * scale)), max(new[1], round(old[1] * scale)), scale < 1
