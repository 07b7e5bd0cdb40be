from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.metrics import MAX_PSNR_DB, psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two crops of a photograph, odd-sized, and the same with blur-like, noise and brightness errors."""
    photograph = skimage_data.astronaut()
    truth = np.stack([photograph[50:177, 150:305], photograph[200:327, 100:255]])
    noise = np.random.default_rng(0).normal(0, [12], truth.shape)
    changed = truth * 0.9 + 8 + noise
    changed[1] = (truth[1] + np.roll(truth[1], 2, axis=1).astype(float)) / 2
    return truth, changed.round().clip(0, 255).astype(np.uint8)


def test_psnr_of_a_constant_error():
    truth = np.full((3, 4, 5, 3), 100, np.uint8)
    # An error of e everywhere gives 20 log10(255 / e).
    predicted = truth + np.array([1, 10, 0], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(psnr(truth, predicted), [48.1308036, 28.1308036, MAX_PSNR_DB], atol=1e-6)


def test_psnr_equals_skimage(pair):
    wanted = [skimage_metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pair, strict=True)]
    # Squared errors are summed in float64 from exact integers in float32.
    np.testing.assert_allclose(psnr(*pair), wanted, atol=1e-9)


def test_ssim_equals_skimage(pair):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wanted = [
        skimage_metrics.structural_similarity(a, b, channel_axis=-1, data_range=255, **options)
        for a, b in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(ssim(*pair), wanted, atol=1e-7)


def test_ssim_of_equal_and_of_constant_frames():
    noise = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    assert ssim(noise, noise)[0] == pytest.approx(1, abs=1e-12)
    dark, bright = np.full((1, 16, 16, 3), 50, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
    # Without structure only the luminance term is left.
    assert ssim(dark, bright)[0] == pytest.approx((2 * 50 * 150 + 6.5025) / (50**2 + 150**2 + 6.5025), abs=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("truth", "prediction"),
    [
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 16, 16, 3), np.uint8)),
        (np.zeros((2, 16, 16, 3), np.float32), np.zeros((2, 16, 16, 3), np.float32)),
        (np.zeros((3, 2, 16, 16), np.uint8), np.zeros((3, 2, 16, 16), np.uint8)),
        (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((0, 16, 16, 3), np.uint8)),
    ],
)
def test_videos_that_cannot_be_compared_are_refused(measure, truth, prediction):
    with pytest.raises(UserError, match="videos to compare"):
        measure(truth, prediction)


def test_frames_smaller_than_the_window_are_refused():
    small = np.zeros((1, 10, 64, 3), np.uint8)
    with pytest.raises(UserError, match="at least 11"):
        ssim(small, small)
