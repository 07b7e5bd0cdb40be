"""Fréchet distance between two sets of feature vectors, computed without a matrix root."""

from __future__ import annotations

import numpy as np

from nemo_cosmos.errors import user_error


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the normal distributions with the sets' means and covariances.

        |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

    With factors S = R^T R of the sample covariances, the eigenvalues of S_x S_y are the squared singular values of
    R_x R_y^T, so the last trace is the sum of these. That is exact where a covariance is singular, as with fewer
    samples than features, where an iterated root of S_x S_y drifts into complex numbers and gets patched with a
    multiple of the identity. What few samples do to the covariances themselves it cannot mend: the distance of
    two independent sets is biased upwards, so only distances of equally large sets compare.

    Args:
        x: Float [N, D] with N >= 2.
        y: Float [M, D] with M >= 2.

    Returns:
        At least 0, in squared units of the features.

    Raises:
        UserError: The shapes do not fit, or a value is not finite.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise user_error("feature sets", (x.shape, y.shape), "[N, D] and [M, D], N and M at least 2", "Measure more.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise user_error("feature sets", "NaN or infinity", "finite numbers", "Look for broken frames.")
    root_x, root_y = _covariance_factor(x), _covariance_factor(y)
    between_means = np.square(x.mean(0) - y.mean(0)).sum()
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    # Rounding can leave equal sets a hair below zero.
    return float(max(0.0, between_means + np.square(root_x).sum() + np.square(root_y).sum() - 2 * cross))


def _covariance_factor(x: np.ndarray) -> np.ndarray:
    """Returns R [min(N, D), D] with R^T R the sample covariance of x [N, D]."""
    return np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")
