"""How the camera moved: a similarity fitted to each motion field, and tags for what the whole clip does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CAMERA_TAGS = (
    "camera:static",
    "camera:pan_left",
    "camera:pan_right",
    "camera:tilt_up",
    "camera:tilt_down",
    "camera:zoom_in",
    "camera:zoom_out",
    "camera:jitter",
)

_MIN_SHIFT = 0.01
"""Share of height + width per second (2% of a square picture's side): slower pans and tilts are not tagged."""
_MIN_ZOOM = 0.02
"""Growth of the picture per second."""
_MIN_JITTER = 5e-4
"""Change of the shift from one frame to the next, as a share of height + width (a quarter pixel of 256x256)."""
_SHAKEN = 0.8
"""Jitter as a share of the shift from which on it is no steady movement: 0 for a steady pan, 1.7 for white noise."""
_STEADY = 0.6
"""Mean movement as a share of the mean of its absolute values: 1 for a steady one, 0 for one to and fro."""
_ITERATIONS = 8


@dataclass(frozen=True, kw_only=True)
class CameraMotion:
    """What the camera of a clip did, on average."""

    pan: float
    """Turn to the right (a dolly to the right looks the same), as a share of height + width per second."""
    tilt: float
    """Turn upwards, in the same unit."""
    zoom: float
    """Growth of the picture per second; moving forwards counts as zooming in."""
    jitter: float
    """Mean change of the shift from one frame to the next, as a share of height + width."""
    tags: tuple[str, ...]
    """Some of `CAMERA_TAGS`: those of pan, tilt and zoom that are steady and not small beside each other."""


def fit_camera(field: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fits shift, growth and roll to a motion field, robust against things that move by themselves.

    Args:
        field: Motion per frame [rows, columns, 2] of square cells, as a share of height + width; NaN where unknown.
        weight: How far each cell is trusted [rows, columns], 0 or more.

    Returns:
        float64 [4]: shift right, shift down, growth, roll (clockwise, radians), each per frame. Zeros where nothing is
        known.
    """
    rows, columns = field.shape[:2]
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    x, y = (x + 0.5 - columns / 2) / (rows + columns), (y + 0.5 - rows / 2) / (rows + columns)
    known = (np.isfinite(field).all(axis=-1) & (weight > 0)).ravel()
    if known.sum() < 3:
        return np.zeros(4)
    # As complex numbers: motion = shift + (growth + i roll) * place, and its weighted least squares in closed form.
    place = (x + 1j * y).ravel()[known]
    motion = (field[..., 0] + 1j * field[..., 1].astype(np.float64)).ravel()[known]
    trust = weight.ravel()[known].astype(np.float64)
    shift, turn = 0j, 0j
    current = trust
    for _ in range(_ITERATIONS):
        share = current / current.sum()
        place_mean, motion_mean = (share * place).sum(), (share * motion).sum()
        arm = place - place_mean
        turn = (share * arm.conj() * (motion - motion_mean)).sum() / ((share * np.abs(arm) ** 2).sum() + 1e-12)
        shift = motion_mean - turn * place_mean
        residual = np.abs(motion - shift - turn * place)
        spread = 1.5 * np.median(residual) + 1e-6
        current = trust / (1 + np.square(residual / spread))  # Cauchy's weights
    return np.array([shift.real, shift.imag, turn.real, turn.imag])


def describe_camera(runs: Sequence[np.ndarray], fps: float) -> CameraMotion:
    """Sums up the fits of a clip.

    Args:
        runs: Fits as of `fit_camera`, [n, 4] of frames that follow one another; jitter is told where n >= 2.
        fps: Frames per second.
    """
    every = np.concatenate(list(runs)) if runs else np.zeros((1, 4))
    changes = [np.linalg.norm(np.diff(run[:, :2], axis=0), axis=1) for run in runs if len(run) > 1]
    jitter = float(np.concatenate(changes).mean()) if changes else 0.0
    shift = float(np.linalg.norm(every[:, :2], axis=1).mean())
    right, down, growth = (float(value) for value in every[:, :3].mean(axis=0) * fps)
    if jitter > _MIN_JITTER and jitter > _SHAKEN * shift:
        tags: tuple[str, ...] = ("camera:jitter",)
    else:
        tags = _steady_tags(every[:, :3] * fps)
    return CameraMotion(pan=-right, tilt=down, zoom=growth, jitter=jitter, tags=tags)


def _steady_tags(motion: np.ndarray) -> tuple[str, ...]:
    """Names the movements among shift right, shift down and growth per second, [N, 3]."""
    mean, size = motion.mean(axis=0), np.abs(motion).mean(axis=0)
    # The picture's border moves by a quarter of height + width times the growth, which makes the two comparable.
    strength = np.abs(mean) * (1.0, 1.0, 0.25)
    names = (("camera:pan_left", "camera:pan_right"), ("camera:tilt_up", "camera:tilt_down"))
    named = (*names, ("camera:zoom_in", "camera:zoom_out"))
    least = (_MIN_SHIFT, _MIN_SHIFT, _MIN_ZOOM)
    tags = []
    for axis, (positive, negative) in enumerate(named):
        steady = abs(mean[axis]) >= _STEADY * size[axis]
        if steady and abs(mean[axis]) >= least[axis] and strength[axis] >= 0.35 * strength.max():
            tags.append(positive if mean[axis] > 0 else negative)
    if tags:
        return tuple(tags)
    return ("camera:static",) if np.all(size < 2 * np.array(least)) else ()
