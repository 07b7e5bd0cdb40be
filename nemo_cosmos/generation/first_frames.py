"""The frames that a video goes on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nemo_cosmos.errors import user_error
from nemo_cosmos.video_io import resize_frames

_SAME_RATE = 0.01
"""Share by which two rates differ that are meant to be one, such as 24 and 23.976."""


def read_first_frames(path: Path, *, num_frames: int, fps: float, height: int, width: int) -> np.ndarray:
    """Reads the frames to go on from: an image, or the end of a video.

    Pictures of another shape are scaled to cover the size and cut at their edges; of a video of a higher rate, frames
    are left out.

    Args:
        path: A png, jpg or video file.
        num_frames: How many frames are wanted from a video: its last ones.
        fps: Frames per second of what is generated.
        height: Pixels.
        width: Pixels.

    Returns:
        uint8 [num_frames or 1, height, width, 3].

    Raises:
        UserError: The file cannot be read, or the video is too short or of too low a rate.
    """
    from nemo_cosmos.video_io import read_image, read_video

    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        return resize_frames(read_image(path)[None], height, width)
    frames, own_fps = read_video(path)
    step = own_fps / fps
    if num_frames > 1 and step < 1 - _SAME_RATE:
        raise user_error(
            f"frames per second of {path}",
            own_fps,
            f"at least those generated ({fps})",
            "Generate at its rate (--fps), or go on from one frame.",
        )
    step = 1.0 if abs(step - 1) < _SAME_RATE else step
    back = np.round(np.arange(num_frames)[::-1] * step).astype(int)
    if len(frames) <= back[0]:
        expected = f"at least {back[0] + 1} frames for {num_frames} at {fps} a second"
        raise user_error(str(path), f"{len(frames)} frames", expected, "Give a longer video.")
    return resize_frames(frames[len(frames) - 1 - back], height, width)
