from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.frechet import frechet_distance


def _samples(covariance: np.ndarray, mean: np.ndarray, *, number: int, seed: int) -> np.ndarray:
    """Draws [number, D] and bends it until mean and sample covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(number, len(covariance)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_two_normal_distributions_have_the_distance_of_the_closed_form():
    variances_x, variances_y = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    x = _samples(np.diag(variances_x), np.array([1.0, 0.0, -2.0]), number=50, seed=0)
    y = _samples(np.diag(variances_y), np.array([1.0, 3.0, 2.0]), number=80, seed=1)
    # |m|^2 = 9 + 16; sum of (sigma_x - sigma_y)^2 = 1 + 0 + 4. Exact but for rounding in float64.
    assert frechet_distance(x, y) == pytest.approx(30.0, rel=1e-12)


def test_covariances_that_do_not_commute_agree_with_the_matrix_root():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 6)) @ generator.normal(size=(6, 6))
    y = generator.normal(size=(40, 6)) @ generator.normal(size=(6, 6)) + 1
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s_x + s_y - 2 * sqrtm(s_x @ s_y).real)
    # scipy's root of a product that is not symmetric is good to about 1e-12 here.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(2, 300), (10, 300), (300, 10)])
def test_a_set_is_at_no_distance_from_itself(shape):
    x = np.random.default_rng(0).normal(size=shape)
    # Of the traces, about min(shape), nothing but rounding is left.
    assert frechet_distance(x, x[::-1]) < 1e-11


def test_fewer_samples_than_features_are_exact():
    """A set along one direction, and another along a direction that is not orthogonal to it."""
    angle = 0.3
    a, b = np.zeros(500), np.zeros(500)
    a[3], b[3], b[7] = 1.0, np.cos(angle), np.sin(angle)
    steps = np.array([-2.0, 0.0, 2.0])
    # Variances 4 and 9 along a and b: tr S_x + tr S_y - 2 |cos| 2 3.
    expected = 4 + 9 - 12 * np.cos(angle)
    assert frechet_distance(np.outer(steps, a), np.outer(1.5 * steps, b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3))),
        (np.zeros((4, 3)), np.zeros((4, 2))),
        (np.zeros(4), np.zeros(4)),
        (np.full((4, 3), np.nan), np.zeros((4, 3))),
    ],
)
def test_sets_without_a_distance_are_refused(x, y):
    with pytest.raises(UserError, match="feature sets"):
        frechet_distance(x, y)
