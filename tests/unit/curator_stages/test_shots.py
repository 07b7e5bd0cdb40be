from __future__ import annotations

import numpy as np
import pytest

from curator_stages.config import CurationConfig
from curator_stages.shots import make_detector, windows
from tests.unit.curator_stages.samples import moving_texture, real_frames


@pytest.fixture(scope="module")
def spliced() -> list[np.ndarray]:
    """The first 20 frames each of three real clips."""
    return [f for n in ("carphone_pristine", "bikes", "bigbuckbunny") for f in real_frames(n, 0, 20)]


@pytest.mark.parametrize(("detector", "cuts"), [("content", [20, 40]), ("transnetv2", [20, 40]), ("fixed_stride", [])])
def test_cuts_between_real_clips_are_found(spliced: list[np.ndarray], detector: str, cuts: list[int]) -> None:
    config = CurationConfig(captioner="none", shot_detector=detector)
    assert make_detector(config).cuts(spliced, 25.0) == cuts


def test_short_shots_are_not_merged_into_their_neighbours() -> None:
    frames = [*moving_texture(20, seed=1), *moving_texture(3, seed=2), *moving_texture(20, seed=3)]
    assert make_detector(CurationConfig(captioner="none")).cuts(frames, 25.0) == [20, 23]


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [
        (10, 10, [(0, 8), (8, 18), (18, 25)]),
        (10, 5, [(0, 8), (8, 18), (13, 23), (18, 25)]),
        (10, 20, [(0, 8), (8, 18)]),
        (100, 50, [(0, 8), (8, 25)]),
    ],
)
def test_windows_stay_inside_shots(length: int, stride: int, expected: list) -> None:
    assert windows(25, [8], length=length, stride=stride) == expected


def test_windows_side_by_side_cover_every_frame_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = sorted(set(rng.integers(1, 200, 5).tolist()))
        length = int(rng.integers(2, 60))
        seen = [f for start, end in windows(200, cuts, length=length, stride=length) for f in range(start, end)]
        assert seen == list(range(200))
