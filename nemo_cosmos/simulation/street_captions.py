"""Captions of a drive, told from the states of the car and from what stands around it."""

from __future__ import annotations

import numpy as np

from nemo_cosmos.contracts import CaptionWindow
from nemo_cosmos.simulation.rollout import caption_spans
from nemo_cosmos.simulation.town import Town

NEAR = 30.0
"""Metres; things within this distance and ahead are named."""


def describe(town: Town, states: np.ndarray, fps: float) -> tuple[CaptionWindow, ...]:
    """Describes a drive window by window.

    Args:
        town: Where it goes.
        states: [T, 7]; see `driving`.
        fps: Frames per second.
    """
    windows = []
    for start, end in caption_spans(len(states)):
        text = f"{motion_sentence(states[start:end], fps)} {place_sentence(town, states[start])}"
        windows.append(CaptionWindow(start_frame=start, end_frame=end, text=text, captioner="simulator"))
    return tuple(windows)


def motion_sentence(states: np.ndarray, fps: float) -> str:
    """Says how the car moves over states [T, 7]."""
    speed = states[:, 3]
    mean = float(speed.mean())
    if np.abs(speed).max() < 0.3:
        return "A car stands still on a town street."
    verb = "rolls backwards" if mean < -0.3 else "drives"
    pace = "slowly" if abs(mean) < 4 else "fast" if abs(mean) > 9 else "at medium speed"
    parts = [f"A car {verb} {pace} along a town street", *_turning(states, fps)]
    change = float(speed[-1] - speed[0])
    if mean > 0 and abs(speed[-1]) < 0.5 and change < -1:
        parts.append("brakes to a halt")
    elif change < -2.5:
        parts.append("slows down")
    elif change > 2.5:
        parts.append("speeds up")
    return (parts[0] + ", " + " and ".join(parts[1:]) if len(parts) > 1 else parts[0] + " straight ahead") + "."


def _turning(states: np.ndarray, fps: float) -> list[str]:
    """Names the turn of a window: a full one, a slight one, a swerve to both sides, or nothing."""
    yaw_rate = np.diff(states[:, 2]) * fps
    turned = float(states[-1, 2] - states[0, 2])
    side = "left" if turned > 0 else "right"
    if abs(turned) > 0.6:
        return [f"turns sharply {side}"]
    left, right = yaw_rate.clip(0).sum() / fps, -yaw_rate.clip(max=0).sum() / fps
    if min(left, right) > 0.1:
        return ["weaves left and right"]
    return [f"bears {side}"] if abs(turned) > 0.15 else []


def place_sentence(town: Town, state: np.ndarray) -> str:
    """Says what stands near and ahead of a car of state [7], and how the sky looks."""
    houses = [h for h in town.buildings if _ahead(h.centre, state)]
    counts: dict[str, int] = {}
    for house in houses:
        counts[house.facade] = counts.get(house.facade, 0) + 1
    common = sorted(counts, key=lambda name: (-counts[name], name))[:2]
    things = [f"{' and '.join(common)} buildings"] if common else []
    trees = sum(_ahead(tree.centre, state) for tree in town.trees)
    if trees:
        things.append("many trees" if trees > 5 else "a few trees" if trees > 1 else "a tree")
    paints = sorted({car.paint for car in town.parked if _ahead(car.centre, state)})
    if len(paints) == 1:
        things.append(f"a parked {paints[0]} car")
    elif paints:
        things.append(f"parked {', '.join(paints[:-1])} and {paints[-1]} cars")
    seen = ", ".join(things) if things else "open road"
    return f"Ahead are {seen} under {town.sky}."


def _ahead(place: tuple[float, float], state: np.ndarray) -> bool:
    offset = np.asarray(place) - state[:2]
    distance = float(np.linalg.norm(offset))
    along = offset @ np.array([np.cos(state[2]), np.sin(state[2])])
    return bool(distance < NEAR and along > 0.6 * distance)
