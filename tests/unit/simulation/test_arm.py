from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nemo_cosmos.simulation import arm
from nemo_cosmos.simulation.motion import integrate_actions
from nemo_cosmos.simulation.rollout import Rollout


def test_same_seed_same_frames(arm_rollout: Rollout) -> None:
    again = arm.roll_out(3, name="other", num_frames=24, size=64, fps=10.0)
    np.testing.assert_array_equal(again.cameras["side"].frames, arm_rollout.cameras["side"].frames)
    np.testing.assert_array_equal(again.controls, arm_rollout.controls)


def test_actions_chain_to_the_hands_track(arm_rollout: Rollout) -> None:
    chained = integrate_actions(arm_rollout.body_poses[0], arm_rollout.actions)
    np.testing.assert_allclose(chained, arm_rollout.body_poses, atol=1e-5)
    gripper = arm_rollout.actions[:, 6]
    assert gripper.min() >= 0 and gripper.max() <= 1 and np.ptp(gripper) > 0.1


def test_the_hand_goes_where_the_controls_say() -> None:
    # Seed 1 moves freely; where the hand pushes against something it follows less.
    rollout = arm.roll_out(1, name="free", num_frames=24, size=16, fps=10.0)
    moved = np.diff(rollout.body_poses[:, :3, 3], axis=0)
    assert rollout.controls.shape == (23, 4) and np.abs(rollout.controls).max() <= 1
    # The mocap weld lags and the workspace clips, hence not 1; with two axes swapped it is 0.5.
    assert np.corrcoef(moved.ravel(), rollout.controls[:, :3].ravel())[0, 1] > 0.85
    assert np.linalg.norm(moved, axis=1).mean() > 0.02, "lively: metres per frame"


def test_the_fingers_are_seen_where_the_hand_is(arm_rollout: Rollout, project: Callable, centre_of: Callable) -> None:
    track = arm_rollout.cameras["side"]
    assert (track.poses == track.poses[0]).all()
    hand = np.array([project(track.poses[0], track.intrinsics, p[:3, 3]) for p in arm_rollout.body_poses])
    red, green, blue = np.moveaxis(track.frames.astype(int), -1, 0)
    cyan = (red < 70) & (green > 110) & (blue > 110)
    shown = cyan.sum((1, 2)) > 3
    assert shown.mean() > 0.8
    finger = np.array([centre_of(mask) for mask in cyan[shown]])
    # Upside down or mirrored pictures would give -1 on one axis.
    assert np.corrcoef(finger[:, 0], hand[shown, 0])[0, 1] > 0.95
    assert np.corrcoef(finger[:, 1], hand[shown, 1])[0, 1] > 0.95
    assert np.abs(finger - hand[shown]).max() < 10
