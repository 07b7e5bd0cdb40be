"""Clips of the simulator's town by a camera whose every movement is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nemo_cosmos.simulation.driving import random_start
from nemo_cosmos.simulation.rendering import Camera, choose_gl
from nemo_cosmos.simulation.street import car_poses
from nemo_cosmos.simulation.town import build_town

FPS = 24.0
_DEG_S = {"slow": 6.0, "fast": 25.0}
"""Turn in degrees per second; the view is 75 degrees high."""
_GROWTH_S = {"slow": 0.08, "fast": 0.4}
_SHAKE_DEG = {"slow": 0.4, "fast": 1.5}

MOVEMENTS = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "jitter")


@dataclass(frozen=True, kw_only=True)
class KnownClip:
    """A clip and what its camera did."""

    movement: str
    """One of `MOVEMENTS`."""
    speed: str
    frames: np.ndarray
    """uint8 RGB [T, H, W, 3]."""


def known_clips(*, towns: int, num_frames: int, size: int, seed: int = 0) -> Iterator[KnownClip]:
    """Films each movement, slow and fast, in each town."""
    choose_gl()
    import mujoco

    from nemo_cosmos.simulation.town_scene import build_model

    for number in range(towns):
        rng = np.random.default_rng([seed, number])
        town = build_town(rng)
        model = build_model(town, rng)
        data = mujoco.MjData(model)
        pose = car_poses(random_start(rng, town)[None])[0]
        data.mocap_pos[0] = pose[:3, 3]
        mujoco.mju_mat2Quat(data.mocap_quat[0], np.ascontiguousarray(pose[:3, :3]).ravel())
        mujoco.mj_kinematics(model, data)
        eye = model.camera("front").id
        upright, view = model.cam_quat[eye].copy(), float(model.cam_fovy[eye])
        with contextlib.closing(Camera(model, data, size)) as camera:
            for movement in MOVEMENTS:
                for speed in _DEG_S if movement != "static" else ("slow",):
                    frames = []
                    for yaw, pitch, growth in _path(movement, speed, num_frames, rng):
                        _aim(model, eye, upright, yaw, pitch)
                        focal = growth / np.tan(np.radians(view) / 2)
                        model.cam_fovy[eye] = 2 * np.degrees(np.arctan(1 / focal))
                        mujoco.mj_camlight(model, data)
                        mujoco.mj_kinematics(model, data)
                        frames.append(camera.picture("front"))
                    yield KnownClip(movement=movement, speed=speed, frames=np.stack(frames))


def _path(movement: str, speed: str, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Returns yaw (degrees left), pitch (degrees up) and growth of the picture by frame, [T, 3]."""
    path = np.tile([0.0, 0.0, 1.0], (num_frames, 1))
    seconds = (np.arange(num_frames) - num_frames / 2) / FPS
    axis, sign = {
        "pan_left": (0, 1),
        "pan_right": (0, -1),
        "tilt_up": (1, 1),
        "tilt_down": (1, -1),
    }.get(movement, (0, 0))
    path[:, axis] += sign * _DEG_S[speed] * seconds
    if movement.startswith("zoom"):
        rate = _GROWTH_S[speed] if movement == "zoom_in" else -_GROWTH_S[speed]
        path[:, 2] = np.exp(rate * seconds)
    if movement == "jitter":
        path[:, :2] += rng.normal(0, _SHAKE_DEG[speed], (num_frames, 2))
    return path


def _aim(model, eye: int, upright: np.ndarray, yaw_deg: float, pitch_deg: float) -> None:  # noqa: ANN001 - mujoco.MjModel
    """Turns a camera; its own axes are right, up and backwards."""
    import mujoco

    turn, left, up = np.empty(4), np.empty(4), np.empty(4)
    mujoco.mju_axisAngle2Quat(left, np.array([0.0, 1.0, 0.0]), np.radians(yaw_deg))
    mujoco.mju_axisAngle2Quat(up, np.array([1.0, 0.0, 0.0]), np.radians(pitch_deg))
    mujoco.mju_mulQuat(turn, left, up)
    mujoco.mju_mulQuat(model.cam_quat[eye], upright, turn)
