"""Rigid motions of a body between frames, as the 7-d actions of `nemo_cosmos.contracts.ACTION_DIM`."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation


def pose_matrix(position: np.ndarray, roll_pitch_yaw: np.ndarray) -> np.ndarray:
    """Builds body-to-world matrices.

    Args:
        position: [..., 3]; metres.
        roll_pitch_yaw: [..., 3]; radians about the fixed x, y, z axes in this order (R = Rz Ry Rx).

    Returns:
        [..., 4, 4].
    """
    pose = np.zeros((*np.shape(position)[:-1], 4, 4))
    flat = np.reshape(roll_pitch_yaw, (-1, 3))
    pose[..., :3, :3] = Rotation.from_euler("xyz", flat).as_matrix().reshape(*pose.shape[:-2], 3, 3)
    pose[..., :3, 3] = position
    pose[..., 3, 3] = 1.0
    return pose


def relative_actions(body_poses: np.ndarray, gripper: np.ndarray | None = None) -> np.ndarray:
    """Turns a pose track into actions.

    Args:
        body_poses: [T, 4, 4]; body to world, metres.
        gripper: [T]; opening in [0, 1]. None for a body without a gripper, recorded as 0.

    Returns:
        [T-1, 7]; motion from frame t to t+1 in the body frame of t (metres; roll, pitch, yaw in radians), then the
        gripper opening at frame t+1.
    """
    relative = np.linalg.inv(body_poses[:-1]) @ body_poses[1:]
    angles = Rotation.from_matrix(relative[:, :3, :3]).as_euler("xyz")
    opening = np.zeros(len(relative)) if gripper is None else np.asarray(gripper, float)[1:]
    return np.concatenate([relative[:, :3, 3], angles, opening[:, None]], axis=1)


def integrate_actions(start: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Inverse of `relative_actions`: chains the motions from a first pose.

    Args:
        start: [4, 4]; body to world at frame 0.
        actions: [T-1, 7].

    Returns:
        [T, 4, 4].
    """
    poses = [np.asarray(start, float)]
    for step in pose_matrix(actions[:, :3], actions[:, 3:6]):
        poses.append(poses[-1] @ step)
    return np.stack(poses)
