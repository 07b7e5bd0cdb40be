from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from curator_stages.conditions import (
    cover_crop_intrinsics,
    is_simulated,
    problem_with,
    slice_captions,
    slice_conditions,
)
from nemo_cosmos.contracts import Conditions, RawVideo
from nemo_cosmos.video_io import resize_frames
from tests.unit.curator_stages.samples import simulated_video


def test_slice_keeps_one_action_less_than_frames() -> None:
    cut = slice_conditions(simulated_video(20).conditions, 5, 8)
    assert [action[0] for action in cut.actions] == [5, 6, 7, 8, 9, 10, 11]
    assert [pose[0][0] for pose in cut.camera_poses] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert cut.view == "front"


def test_captions_count_from_the_clip_and_stop_at_its_borders() -> None:
    cut = slice_captions(simulated_video(20).captions, 8, 6)
    assert [(c.start_frame, c.end_frame, c.text) for c in cut] == [
        (0, 2, "drive first half"),
        (2, 6, "drive second half"),
    ]
    assert slice_captions(simulated_video(20).captions[:1], 10, 5) == ()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"actions": [[0.0] * 7] * 20}, "actions: got 20 entries, expected 19"),
        ({"actions": [[0.0] * 6] * 19}, "actions[0]: got 6 entries, expected 7"),
        ({"camera_poses": [[[0.0] * 4] * 4] * 19}, "camera_poses: got 19 entries, expected 20"),
        ({"camera_poses": [[[0.0] * 4] * 3] * 20}, "camera_poses[0]: got 3 entries, expected 4"),
    ],
)
def test_conditions_that_do_not_fit_are_named(wrong: dict, named: str) -> None:
    video = simulated_video(20)
    assert problem_with(video) is None
    assert named in problem_with(replace(video, conditions=replace(video.conditions, **wrong)))


def test_a_sidecar_with_names_only_is_a_real_video() -> None:
    plain = RawVideo(source="packaged", rollout="x", fps=25.0, num_frames=9, split="train")
    assert not is_simulated(plain)
    assert is_simulated(simulated_video(20))
    assert is_simulated(replace(plain, captions=simulated_video(20).captions))
    assert not is_simulated(replace(plain, conditions=Conditions(view="front")))


@pytest.mark.parametrize("old", [(120, 200), (200, 120), (64, 64), (33, 77)])
def test_intrinsics_follow_a_pixel_through_resize_and_crop(old: tuple[int, int]) -> None:
    """A bright square's centre, projected by the new matrix, is where the resized picture shows it."""
    height, width = old
    frame = np.zeros((1, height, width, 3), np.uint8)
    row, column = height // 2 - 2, width // 2 + 3
    frame[0, row : row + 4, column : column + 4] = 255
    fx, fy, cx, cy = 90.0, 80.0, width / 2 + 1, height / 2 - 1
    ray = np.array([(column + 2 - cx) / fx, (row + 2 - cy) / fy, 1.0])
    new = np.array(cover_crop_intrinsics([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], old, (64, 64)))
    shown = resize_frames(frame, 64, 64)[0, ..., 0].astype(float)
    rows, columns = np.mgrid[:64, :64] + 0.5
    seen = np.array([(shown * columns).sum(), (shown * rows).sum()]) / shown.sum()
    np.testing.assert_allclose((new @ ray)[:2], seen, atol=0.3)
