"""Motion between neighbouring frames as fields: from optical flow, or from the vectors that a video codec carries.

A field is float32 [rows, columns, 2]: right and down, per frame, as a share of height + width (NeMo-Curator's unit).
"""

from __future__ import annotations

import av
import numpy as np

_BLOCK = 16
"""Pixels of the side of a macroblock, whose vectors are averaged."""


def flow_fields(frames: np.ndarray, firsts: np.ndarray) -> dict[int, np.ndarray]:
    """Measures the motion from some frames to the next ones by dense inverse search optical flow.

    Args:
        frames: uint8 RGB [T, H, W, 3].
        firsts: Numbers of the frames, each below T - 1.

    Returns:
        A field [H, W, 2] by number of the frame.

    Source: Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search", https://arxiv.org/abs/1603.03590.
    """
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    no_guess = np.empty(0, np.float32)
    grey = {i: cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY) for first in firsts for i in (first, first + 1)}
    size = sum(frames.shape[1:3])
    return {int(first): flow.calc(grey[first], grey[first + 1], no_guess) / size for first in firsts}


def texture(frame: np.ndarray) -> np.ndarray:
    """How much there is to follow around each pixel: uint8 [H, W, 3] -> float32 [H, W], the mean gradient's length."""
    import cv2

    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    # Not by cv2.magnitude, whose last bits depend on where in memory the arrays lie.
    return cv2.blur(np.sqrt(across * across + down * down), (8, 8))


def codec_field(frame: av.VideoFrame, distance: int) -> np.ndarray | None:
    """Reads the motion vectors of a predicted frame.

    Args:
        frame: A P frame, decoded with `export_mvs`.
        distance: Frames from the one that it is predicted from.

    Returns:
        A field with one entry per macroblock, NaN where it has no vector; None where the codec exports none.
    """
    data = frame.side_data.get("MOTION_VECTORS")
    if data is None:
        return None
    vectors = data.to_ndarray()
    vectors = vectors[vectors["source"] < 0]
    rows, columns = -(-frame.height // _BLOCK), -(-frame.width // _BLOCK)
    places = np.clip(vectors["dst_y"] // _BLOCK, 0, rows - 1) * columns + np.clip(
        vectors["dst_x"] // _BLOCK, 0, columns - 1
    )
    area = vectors["w"].astype(np.float64) * vectors["h"]
    weight = np.bincount(places, area, rows * columns)
    # A vector points from the block to where it comes from.
    scale = -area / vectors["motion_scale"] / distance / (frame.height + frame.width)
    sums = [np.bincount(places, scale * vectors[name], rows * columns) for name in ("motion_x", "motion_y")]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.stack(sums, axis=-1) / weight[:, None]
    return mean.reshape(rows, columns, 2).astype(np.float32)


def turned(field: np.ndarray, quarter_turns: int) -> np.ndarray:
    """Turns a field counter-clockwise along with its picture."""
    for _ in range(quarter_turns % 4):
        field = np.rot90(field)
        field = np.stack([field[..., 1], -field[..., 0]], axis=-1)
    return field
