"""Rollouts that several tests look at, small and made once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nemo_cosmos.simulation.rendering import choose_gl
from nemo_cosmos.simulation.rollout import Rollout


@pytest.fixture(scope="session", autouse=True)
def gl() -> None:
    choose_gl()


@pytest.fixture(scope="session")
def street_rollout() -> Rollout:
    from nemo_cosmos.simulation import street

    return street.roll_out(7, name="street_0000007", cameras=("front", "rear_left"), num_frames=6, size=64, fps=10.0)


@pytest.fixture(scope="session")
def arm_rollout() -> Rollout:
    from nemo_cosmos.simulation import arm

    return arm.roll_out(3, name="arm_0000003", num_frames=24, size=64, fps=10.0)


@pytest.fixture(scope="session")
def project() -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Where a camera of given pose and intrinsics sees a point: column and row."""

    def of(camera_to_world: np.ndarray, intrinsics: np.ndarray, point: np.ndarray) -> np.ndarray:
        seen = intrinsics @ (np.linalg.inv(camera_to_world) @ np.append(point, 1.0))[:3]
        return seen[:2] / seen[2]

    return of


@pytest.fixture(scope="session")
def centre_of() -> Callable[[np.ndarray], np.ndarray]:
    """Mean place of the pixels in a mask: column and row."""

    def of(mask: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(mask)
        assert len(rows) > 1
        return np.array([columns.mean() + 0.5, rows.mean() + 0.5])

    return of
