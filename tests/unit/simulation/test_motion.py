from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.simulation.motion import integrate_actions, pose_matrix, relative_actions


def test_integrating_relative_motions_gives_the_track_back() -> None:
    rng = np.random.default_rng(0)
    poses = pose_matrix(rng.normal(size=(20, 3)), rng.uniform(-1.2, 1.2, (20, 3)))
    np.testing.assert_allclose(integrate_actions(poses[0], relative_actions(poses)), poses, atol=1e-10)


def test_motion_is_told_in_the_previous_body_frame() -> None:
    # Heading north, one metre north and a quarter turn left: ahead by one, no sideways motion, yaw +90 degrees.
    poses = pose_matrix(np.array([[5.0, 5, 0], [5, 6, 0]]), np.array([[0, 0, np.pi / 2], [0, 0, np.pi]]))
    np.testing.assert_allclose(relative_actions(poses)[0], [1, 0, 0, 0, 0, np.pi / 2, 0], atol=1e-12)


@pytest.mark.parametrize(("axis", "moved", "towards"), [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_angles_turn_by_the_right_hand(axis: int, moved: int, towards: int) -> None:
    angles = np.zeros(3)
    angles[axis] = 0.3
    turned = pose_matrix(np.zeros(3), angles)[:3, moved]
    assert turned[towards] == pytest.approx(np.sin(0.3))


def test_gripper_is_the_opening_after_the_step() -> None:
    poses = np.repeat(np.eye(4)[None], 3, 0)
    assert relative_actions(poses, np.array([0.1, 0.5, 0.9]))[:, 6].tolist() == [0.5, 0.9]
