"""Captions of an arm rollout, told from task, hand motion, gripper and success."""

from __future__ import annotations

import numpy as np

from nemo_cosmos.contracts import CaptionWindow
from nemo_cosmos.simulation.rollout import caption_spans

TASKS = {
    "reach-v3": ("reaches for a goal above the table", "cylinder"),
    "push-v3": ("pushes the {thing} over the table", "puck"),
    "pick-place-v3": ("grasps and lifts the {thing}", "puck"),
    "drawer-open-v3": ("pulls the {thing} open", "drawer"),
    "door-open-v3": ("pulls the {thing} open", "door"),
    "button-press-v3": ("presses the button of the {thing}", "box"),
    "window-open-v3": ("slides the {thing} open", "window"),
    "drawer-close-v3": ("pushes the {thing} shut", "drawer"),
}
"""What the expert does and what it does it to, by Meta-World task."""

COLOURS = {
    "red": (0.9, 0.12, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.12, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.1),
    "orange": (0.98, 0.5, 0.05),
    "purple": (0.55, 0.15, 0.75),
    "white": (0.95, 0.95, 0.95),
}

FAR = 0.08
"""Metres; a shift of the hand below this is not told."""


def describe(
    task: str,
    colour: str,
    hand_poses: np.ndarray,
    camera_pose: np.ndarray,
    openings: np.ndarray,
    states: list[tuple[str, bool]],
) -> tuple[CaptionWindow, ...]:
    """Describes a rollout window by window.

    Args:
        task: A key of `TASKS`.
        colour: A key of `COLOURS`; the object's.
        hand_poses: [T, 4, 4]; hand to world.
        camera_pose: [4, 4]; camera to world, OpenCV axes; left and right are as the viewer sees them.
        openings: [T]; gripper opening in [0, 1].
        states: T-1 pairs: `task` or `swing`, and whether the task is done.
    """
    verb, noun = TASKS[task]
    article = "an" if colour[0] in "aeiou" else "a"
    seen = (hand_poses[:, :3, 3] - camera_pose[:3, 3]) @ camera_pose[:3, :3]
    windows = []
    for start, end in caption_spans(len(seen)):
        inside = states[start : max(end - 1, start + 1)]
        doing = [what for what, _ in inside]
        works = doing.count("task") * 2 >= len(doing)
        action = verb.format(thing=noun) if works else "swings freely above the table"
        done = " The task is done." if inside and inside[-1][1] else ""
        moves = ", ".join([*_shift(seen[start:end]), *_grip(openings[start:end])])
        text = (
            f"A robot arm at a table with {article} {colour} {noun} {action}."
            + (f" The hand {moves}." if moves else " The hand stays about where it is.")
            + done
        )
        windows.append(CaptionWindow(start_frame=start, end_frame=end, text=text, captioner="simulator"))
    return tuple(windows)


def _shift(seen: np.ndarray) -> list[str]:
    """Names the hand's net shift over a window, in camera axes [T, 3] (right, down, away)."""
    shift = seen[-1] - seen[0]
    names = (("left", "right"), ("up", "down"), ("towards the viewer", "away from the viewer"))
    told = [names[axis][int(shift[axis] > 0)] for axis in np.argsort(-np.abs(shift)) if abs(shift[axis]) > FAR]
    return [f"moves {' and '.join(told[:2])}"] if told else []


def _grip(openings: np.ndarray) -> list[str]:
    change = float(openings[-1] - openings[0])
    if abs(change) < 0.15:
        return []
    return ["opens its fingers" if change > 0 else "closes its fingers"]
