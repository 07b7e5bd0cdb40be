from __future__ import annotations

import av
import cv2
import numpy as np
import pytest

from curator_stages.scaling import Scaler, upright_size
from curator_stages.source_frames import SourceFrame
from nemo_cosmos.video_io import resize_frames
from tests.unit.curator_stages.samples import moving_texture


def source(height: int, width: int, quarter_turns: int) -> SourceFrame:
    picture = cv2.GaussianBlur(moving_texture(1, seed=0, height=height, width=width)[0], (0, 0), 4)
    picture[..., 1:] = picture[..., :1]  # the colours of small blots are where the libraries differ
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    return SourceFrame(index=0, frame=frame, quarter_turns=quarter_turns, deinterlaced=False, codec_motion=None)


@pytest.mark.parametrize("quarter_turns", [0, 1, 2])
@pytest.mark.parametrize("size", [(64, 64), (48, 100), (144, 200), (160, 288), None])
def test_a_picture_is_what_scaling_and_cropping_it_in_two_steps_gives(
    size: tuple[int, int] | None, quarter_turns: int
) -> None:
    frame = source(144, 200, quarter_turns)
    upright = np.rot90(frame.frame.to_ndarray(format="rgb24"), k=quarter_turns)
    expected = resize_frames(upright[None], *(size or upright.shape[:2]))[0]
    picture = Scaler(size).picture(frame)
    assert upright_size(frame) == upright.shape[:2]
    assert picture.shape == expected.shape
    difference = np.abs(picture.astype(float) - expected).mean()
    assert difference < 2.0  # rounding; a shift by one pixel, below, makes more
    assert difference < np.abs(np.roll(expected, 1, axis=(0, 1)).astype(float) - expected).mean() / 2


def test_one_scaler_serves_frames_of_several_sizes() -> None:
    scaler = Scaler((32, 32))
    first = scaler.picture(source(64, 64, 0)).copy()
    scaler.picture(source(96, 64, 0))
    assert np.array_equal(scaler.picture(source(64, 64, 0)), first)
