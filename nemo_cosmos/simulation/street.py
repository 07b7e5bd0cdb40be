"""Rollouts of a car that drives through a random town with up to six synchronized cameras."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.simulation import street_captions
from nemo_cosmos.simulation.driving import Drive, drive, follow, random_start
from nemo_cosmos.simulation.motion import pose_matrix, relative_actions
from nemo_cosmos.simulation.rendering import Camera
from nemo_cosmos.simulation.rollout import CameraTrack, Rollout
from nemo_cosmos.simulation.town import Town, build_town

if TYPE_CHECKING:
    import mujoco

_DOMAIN_TAG = 1
"""Keeps this domain's random numbers apart from the arm's at equal seeds."""


def roll_out(
    seed: int, *, name: str, num_frames: int, size: int, fps: float, cameras: tuple[str, ...] = ("front",)
) -> Rollout:
    """Drives through the town of `seed` by manoeuvres of its own choice.

    Args:
        seed: Decides town, start and manoeuvres.
        name: The rollout's name.
        num_frames: T.
        size: Height and width in pixels.
        fps: Frames per second.
        cameras: Names out of `town_scene.CAMERAS`.
    """
    town_rng, drive_rng, _ = _generators(seed)
    town = build_town(town_rng)
    return _render(seed, town, drive(drive_rng, town, num_frames, fps), name=name, size=size, fps=fps, cameras=cameras)


def roll_out_controls(
    seed: int, controls: np.ndarray, *, name: str, size: int, fps: float, cameras: tuple[str, ...] = ("front",)
) -> Rollout:
    """Drives through the town of `seed`, from the start that `roll_out` takes, by given commands.

    Args:
        seed: Decides town and start.
        controls: [T-1, 2]; speed (m/s) and steering angle (rad). Nothing keeps the car off the houses.
        name: The rollout's name.
        size: Height and width in pixels.
        fps: Frames per second.
        cameras: Names out of `town_scene.CAMERAS`.
    """
    town_rng, drive_rng, _ = _generators(seed)
    town = build_town(town_rng)
    start = random_start(drive_rng, town)
    track = Drive(states=follow(start, controls, 1 / fps), controls=np.asarray(controls, float))
    return _render(seed, town, track, name=name, size=size, fps=fps, cameras=cameras)


def _generators(seed: int) -> list[np.random.Generator]:
    return [np.random.default_rng(s) for s in np.random.SeedSequence([_DOMAIN_TAG, seed]).spawn(3)]


def car_poses(states: np.ndarray) -> np.ndarray:
    """Body-to-world poses [T, 4, 4] (x ahead, y left, z up, origin under the rear axle) of states [T, 7]."""
    position = np.concatenate([states[:, :2], np.zeros((len(states), 1))], axis=1)
    return pose_matrix(position, states[:, [6, 5, 2]])


def _render(
    seed: int, town: Town, track: Drive, *, name: str, size: int, fps: float, cameras: tuple[str, ...]
) -> Rollout:
    from nemo_cosmos.simulation.town_scene import build_model

    poses = car_poses(track.states)
    return Rollout(
        source="street",
        name=name,
        seed=seed,
        fps=fps,
        captions=street_captions.describe(town, track.states, fps),
        actions=relative_actions(poses),
        controls=track.controls,
        body_poses=poses,
        cameras=_film(build_model(town, _generators(seed)[2]), poses, cameras, size),
    )


def _film(model: mujoco.MjModel, poses: np.ndarray, cameras: tuple[str, ...], size: int) -> dict[str, CameraTrack]:
    """Moves the car along `poses` [T, 4, 4] and takes every camera's picture at each."""
    import mujoco

    data = mujoco.MjData(model)
    frames: dict[str, list[np.ndarray]] = {view: [] for view in cameras}
    camera_poses: dict[str, list[np.ndarray]] = {view: [] for view in cameras}
    with contextlib.closing(Camera(model, data, size)) as camera:
        for pose in poses:
            data.mocap_pos[0] = pose[:3, 3]
            mujoco.mju_mat2Quat(data.mocap_quat[0], np.ascontiguousarray(pose[:3, :3]).ravel())
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            for view in cameras:
                frames[view].append(camera.picture(view))
                camera_poses[view].append(camera.pose(view))
        return {
            view: CameraTrack(
                frames=np.stack(frames[view]), poses=np.stack(camera_poses[view]), intrinsics=camera.intrinsics(view)
            )
            for view in cameras
        }
