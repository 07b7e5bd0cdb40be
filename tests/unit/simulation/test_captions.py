from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.simulation.arm_captions import describe as describe_arm
from nemo_cosmos.simulation.driving import follow
from nemo_cosmos.simulation.rollout import Rollout, caption_spans
from nemo_cosmos.simulation.street_captions import describe, motion_sentence, place_sentence
from nemo_cosmos.simulation.town import Building, ParkedCar, Town


@pytest.mark.parametrize(
    ("speed", "command", "words", "absent"),
    [
        (12.0, (12.0, 0.0), "drives fast along a town street straight ahead", "turn"),
        (8.0, (8.0, 0.3), "turns sharply left", "right"),
        (8.0, (8.0, -0.3), "turns sharply right", "left"),
        (8.0, (8.0, 0.05), "bears left", "sharply"),
        (8.0, (0.0, 0.0), "brakes to a halt", "speeds"),
        (2.0, (12.0, 0.0), "speeds up", "slows"),
        (-3.0, (-3.0, 0.0), "rolls backwards slowly", "straight ahead and"),
        (0.0, (0.0, 0.0), "stands still", "drives"),
    ],
)
def test_motion_is_told_as_driven(speed: float, command: tuple[float, float], words: str, absent: str) -> None:
    start = np.array([0, 0, 0, speed, command[1], 0, 0])
    sentence = motion_sentence(follow(start, np.full((16, 2), command), 0.1), 10.0)
    assert words in sentence and absent not in sentence


def test_weaving_is_told() -> None:
    steer = 0.3 * np.sin(np.arange(16) / 16 * 2 * np.pi)
    states = follow(np.array([0, 0, 0, 8.0, 0, 0, 0]), np.stack([np.full(16, 8.0), steer], 1), 0.1)
    assert "weaves left and right" in motion_sentence(states, 10.0)


def test_only_what_is_near_and_ahead_is_named() -> None:
    size = {"half": (4.0, 4.0), "height": 9.0, "tall": True}
    town = Town(
        buildings=(
            Building(centre=(20.0, 5.0), facade="red brick", **size),
            Building(centre=(-20.0, 5.0), facade="white", **size),
            Building(centre=(80.0, 5.0), facade="green", **size),
        ),
        parked=(ParkedCar(centre=(12.0, -3.0), yaw=0.0, paint="yellow"),),
        trees=(),
        sky="an overcast sky",
        sun=(1.0, 0.0, -1.0),
        clearance=np.zeros((1, 1)),
    )
    sentence = place_sentence(town, np.zeros(7))
    assert sentence == "Ahead are red brick buildings, a parked yellow car under an overcast sky."
    assert "white buildings" in place_sentence(town, np.array([0, 0, np.pi, 0, 0, 0, 0]))
    assert describe(town, np.zeros((20, 7)), 10.0)[0].captioner == "simulator"


@pytest.mark.parametrize(("frames", "spans"), [(65, 4), (17, 1), (5, 1), (32, 2)])
def test_windows_cover_all_frames_once(frames: int, spans: int) -> None:
    windows = caption_spans(frames)
    assert len(windows) == spans and windows[0][0] == 0 and windows[-1][1] == frames
    assert all(a[1] == b[0] for a, b in zip(windows, windows[1:], strict=False))


def test_hand_motion_is_told_as_the_viewer_sees_it() -> None:
    # A viewer at y = -1 who looks north: world x is to the right, world z up.
    camera = np.eye(4)
    camera[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    camera[1, 3] = -1
    hands = np.repeat(np.eye(4)[None], 16, 0)
    hands[:, 0, 3], hands[:, 2, 3] = np.linspace(0, 0.4, 16), np.linspace(0, 0.2, 16)
    caption = describe_arm(
        "drawer-open-v3", "orange", hands, camera, np.linspace(0, 0.9, 16), [("task", False)] * 14 + [("task", True)]
    )[0].text
    assert caption == (
        "A robot arm at a table with an orange drawer pulls the drawer open. "
        "The hand moves right and up, opens its fingers. The task is done."
    )


def test_rollouts_carry_captions_over_all_their_frames(street_rollout: Rollout, arm_rollout: Rollout) -> None:
    for rollout in (street_rollout, arm_rollout):
        assert rollout.captions[0].start_frame == 0
        assert rollout.captions[-1].end_frame == rollout.num_frames
    assert "drawer" in arm_rollout.captions[0].text
