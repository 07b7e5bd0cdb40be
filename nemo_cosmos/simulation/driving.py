"""A car by the kinematic bicycle model, and a driver that draws lively manoeuvres and keeps clear of things.

State of a car, last axis: x, y (rear axle, metres), yaw, speed (m/s), steering angle, pitch, roll (radians).
A command is (wanted speed m/s, wanted steering angle rad); positive steering turns left.

Source: Rajamani, Vehicle Dynamics and Control, 2nd ed., section 2.2 (bicycle model, rear-axle reference).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_cosmos.simulation.town import HALF_ROAD, STREETS, Town

WHEELBASE = 2.7
MAX_STEERING = 0.55
MAX_SPEED = 15.0
BRAKING = 9.0
ACCELERATION = 6.0
STEERING_RATE = 2.0
"""rad/s."""
SUBSTEPS = 4
"""Integration steps per frame."""
CAR_RADIUS = 1.15
"""Radius of the three circles that cover the car."""
CIRCLES = (-0.3, 1.35, 3.0)
"""Their centres along the car, from the rear axle."""
CANDIDATES = 160
"""Manoeuvres tried at each decision."""

_X, _Y, _YAW, _SPEED, _STEER, _PITCH, _ROLL = range(7)

_KINDS = ("cruise", "launch", "left", "right", "weave", "brake", "stop", "reverse")
_WEIGHTS = np.array([0.8, 1.5, 3.0, 3.0, 2.5, 1.2, 0.6, 0.03])


@dataclass(frozen=True, kw_only=True)
class Drive:
    """A drive of T frames."""

    states: np.ndarray
    """[T, 7]."""
    controls: np.ndarray
    """[T-1, 2]; commanded speed (m/s) and steering (rad)."""


def advance(state: np.ndarray, command: np.ndarray, dt: float) -> np.ndarray:
    """Moves cars on by one frame.

    Args:
        state: [..., 7].
        command: [..., 2].
        dt: Seconds per frame.

    Returns:
        [..., 7].
    """
    step = dt / SUBSTEPS
    state = state.copy()
    for _ in range(SUBSTEPS):
        speed, steer = state[..., _SPEED], state[..., _STEER]
        force = np.clip((command[..., 0] - speed) / step, -BRAKING, ACCELERATION)
        yaw_rate = speed / WHEELBASE * np.tan(steer)
        heading = state[..., _YAW] + yaw_rate * step / 2
        # Springs: the body nods against acceleration and leans out of the curve, with a lag of 0.15 s.
        lag = step / 0.15
        state[..., _PITCH] += lag * (-0.006 * force - state[..., _PITCH])
        state[..., _ROLL] += lag * (0.006 * speed * yaw_rate - state[..., _ROLL])
        state[..., _X] += step * speed * np.cos(heading)
        state[..., _Y] += step * speed * np.sin(heading)
        state[..., _YAW] += step * yaw_rate
        state[..., _SPEED] += step * force
        turn = np.clip((command[..., 1] - steer) / step, -STEERING_RATE, STEERING_RATE)
        state[..., _STEER] = np.clip(steer + step * turn, -MAX_STEERING, MAX_STEERING)
    return state


def follow(start: np.ndarray, controls: np.ndarray, dt: float) -> np.ndarray:
    """Drives by given commands.

    Args:
        start: [..., 7].
        controls: [T-1, ..., 2].
        dt: Seconds per frame.

    Returns:
        [T, ..., 7].
    """
    states = [start]
    for command in controls:
        states.append(advance(states[-1], command, dt))
    return np.stack(states)


def random_start(rng: np.random.Generator, town: Town) -> np.ndarray:
    """Draws a free place on an inner street, roughly along it: [7]."""
    while True:
        line, along = rng.choice(STREETS), rng.uniform(-0.8, 0.8) * STREETS[-1]
        across = line + rng.uniform(-0.35, 0.35) * HALF_ROAD
        vertical, backward = rng.random() < 0.5, rng.random() < 0.5
        state = np.zeros(7)
        state[[_X, _Y]] = (across, along) if vertical else (along, across)
        state[_YAW] = vertical * np.pi / 2 + backward * np.pi + rng.normal(0, 0.08)
        state[_SPEED] = rng.uniform(3, 12)
        tail = follow(state, np.zeros((15, 2)), 0.1)
        if is_free(town, tail).all():
            return state


def drive(rng: np.random.Generator, town: Town, num_frames: int, fps: float) -> Drive:
    """Drives around by random manoeuvres, each followed only if the car could still stop safely after it.

    Args:
        rng: Source of the manoeuvres.
        town: Where.
        num_frames: T.
        fps: Frames per second.
    """
    dt = 1 / fps
    states, controls = [random_start(rng, town)], []
    while len(states) < num_frames:
        length = int(rng.integers(6, 15))
        chosen = _choose(rng, town, states[-1], length, dt)
        states.extend(follow(states[-1], chosen, dt)[1:])
        controls.extend(chosen)
    return Drive(states=np.stack(states[:num_frames]), controls=np.stack(controls[: num_frames - 1]))


def is_free(town: Town, states: np.ndarray) -> np.ndarray:
    """Whether the car touches nothing.

    Args:
        town: Where.
        states: [..., 7].

    Returns:
        bool [...].
    """
    centres = np.array(CIRCLES)
    x = states[..., _X, None] + centres * np.cos(states[..., _YAW, None])
    y = states[..., _Y, None] + centres * np.sin(states[..., _YAW, None])
    return (town.clearance_at(x, y) > CAR_RADIUS).all(-1)


def _choose(rng: np.random.Generator, town: Town, state: np.ndarray, length: int, dt: float) -> np.ndarray:
    """Draws candidates, drops unsafe ones, and picks one at random: [length, 2]."""
    kinds = rng.integers(len(_KINDS), size=CANDIDATES)
    commands = np.stack([_manoeuvre(rng, _KINDS[kind], state[_SPEED], length, dt) for kind in kinds], axis=1)
    full_stop = np.zeros((int(MAX_SPEED / BRAKING / dt) + 2, CANDIDATES, 2))
    track = follow(np.repeat(state[None], CANDIDATES, 0), np.concatenate([commands, full_stop]), dt)
    safe = is_free(town, track).all(0)
    if not safe.any():
        return full_stop[:length, 0]
    travelled = np.linalg.norm(track[length, :, :2] - state[:2], axis=-1)
    weights = safe * _WEIGHTS[kinds] * (0.15 + travelled / MAX_SPEED) ** 2
    return commands[:, rng.choice(CANDIDATES, p=weights / weights.sum())]


def _manoeuvre(rng: np.random.Generator, kind: str, speed: float, length: int, dt: float) -> np.ndarray:
    """Draws the commands [length, 2] of one manoeuvre."""
    wanted = {
        "launch": rng.uniform(9, MAX_SPEED),
        "brake": max(speed, 4.0) * rng.uniform(0.2, 0.6),
        "stop": 0.0,
        "reverse": -rng.uniform(2, 5),
    }.get(kind, max(5.0, speed + rng.uniform(-3, 3)))
    wanted = min(wanted, MAX_SPEED)
    # Side force stays under 8 m/s^2, about what dry tyres hold.
    limit = min(MAX_STEERING, np.arctan(8.0 * WHEELBASE / max(speed, wanted, 1.0) ** 2))
    phase = np.arange(length) * dt
    steer = np.full(length, rng.normal(0, 0.15) * limit)
    if kind in ("left", "right"):
        steer = np.full(length, (1 if kind == "left" else -1) * rng.uniform(0.5, 1.0) * limit)
    elif kind == "weave":
        steer = rng.choice([-1, 1]) * rng.uniform(0.6, 1.0) * limit * np.sin(2 * np.pi * phase / rng.uniform(0.9, 1.6))
    elif kind == "reverse":
        steer = np.full(length, rng.uniform(-1, 1) * MAX_STEERING)
    return np.stack([np.full(length, wanted), steer], axis=1)
