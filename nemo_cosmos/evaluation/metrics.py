"""PSNR and SSIM of videos, frame by frame."""

from __future__ import annotations

import numpy as np

from nemo_cosmos.errors import user_error

MAX_PSNR_DB = 100.0
"""PSNR of equal frames, in place of infinity, so that means stay finite."""

_WINDOW = 11
_WINDOW_SIGMA = 1.5


def psnr(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame, over all its pixels and colours.

    Args:
        truth: uint8 [T, H, W, 3].
        prediction: uint8 [T, H, W, 3].

    Returns:
        float64 [T], dB, at most `MAX_PSNR_DB`.

    Raises:
        UserError: The shapes differ or the frames are not uint8.
    """
    check_pair(truth, prediction)
    errors = truth.astype(np.float32) - prediction
    mse = np.einsum("thwc,thwc->t", errors, errors, dtype=np.float64) / errors[0].size
    return 10 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 * 10 ** (-MAX_PSNR_DB / 10)))


def ssim(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame: 11 px Gaussian window with sigma 1.5, mean over whole windows and colours.

    Source: Wang et al. 2004, "Image quality assessment", section III-B.

    Args:
        truth: uint8 [T, H, W, 3]; H and W at least 11.
        prediction: uint8 [T, H, W, 3].

    Returns:
        float64 [T] in [-1, 1].

    Raises:
        UserError: The shapes differ, the frames are not uint8, or smaller than the window.
    """
    check_pair(truth, prediction)
    if min(truth.shape[1:3]) < _WINDOW:
        raise user_error("frames", truth.shape, f"H and W of at least {_WINDOW}", "SSIM's window does not fit in.")
    return np.array([_ssim_frame(a, b) for a, b in zip(truth, prediction, strict=True)])


def check_pair(truth: np.ndarray, prediction: np.ndarray) -> None:
    """Refuses two videos that cannot be compared.

    Raises:
        UserError: The shapes differ, or they are not uint8 [T, H, W, 3] with at least one frame.
    """
    wanted = truth.ndim == 4 and truth.shape[-1] == 3 and len(truth) > 0
    if not wanted or truth.shape != prediction.shape or not truth.dtype == prediction.dtype == np.uint8:
        raise user_error(
            "videos to compare",
            f"{truth.dtype} {truth.shape} and {prediction.dtype} {prediction.shape}",
            "two uint8 [T, H, W, 3] of one shape",
            "Give the truth and the prediction the same frame count and size.",
        )


def _ssim_frame(a: np.ndarray, b: np.ndarray) -> float:
    import cv2

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (_WINDOW, _WINDOW), _WINDOW_SIGMA)

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = mean(a), mean(b)
    variance_a = mean(a * a) - mean_a**2
    variance_b = mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    edge = _WINDOW // 2
    return float((luminance * structure)[edge:-edge, edge:-edge].mean())
