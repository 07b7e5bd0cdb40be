from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.guardrail.content import ContentFilter, ContentFilterConfig, longest_run, sampled_frames

pytest.importorskip("nudenet")


@pytest.fixture
def content(monkeypatch) -> ContentFilter:
    """A filter whose score is the frame's first pixel over 255."""
    made = ContentFilter()
    monkeypatch.setattr(made, "score", lambda frame: frame[0, 0, 0] / 255)
    return made


def _video(scores: list[float]) -> np.ndarray:
    video = np.zeros((len(scores), 8, 8, 3), np.uint8)
    video[:, 0, 0, 0] = np.round(np.array(scores) * 255)
    return video


@pytest.mark.parametrize(
    ("num_frames", "fps", "picked"),
    [
        (17, 10, [0, 5, 10, 15]),
        (3, 1.0, [0, 1, 2]),
        (3, 0.4, [0, 1, 2]),
        (1, 24, [0]),
        (8, 3, [0, 1, 3, 4, 6, 7]),
    ],
)
def test_frames_are_sampled_at_two_per_second(num_frames, fps, picked):
    assert sampled_frames(num_frames, fps=fps, sample_fps=2.0).tolist() == picked


@pytest.mark.parametrize(("num_frames", "fps"), [(0, 10), (5, 0), (5, float("nan"))])
def test_nothing_to_sample_is_an_error(num_frames, fps):
    with pytest.raises(ValueError, match="sampled_frames"):
        sampled_frames(num_frames, fps=fps, sample_fps=2.0)


def test_longest_run():
    assert longest_run(np.array([1, 1, 0, 1, 1, 1, 0], bool)) == 3
    assert longest_run(np.zeros(4, bool)) == 0


@pytest.mark.parametrize(
    ("scores", "safe"),
    [
        ([0, 1, 0, 1, 1, 0], True),  # two false alarms and a pair
        ([0, 1, 1, 1, 0, 0], False),
        ([0.5, 0.5, 0.5, 0.5], True),  # under the threshold
        ([1], False),  # fewer samples than the limit: all of them unsafe
        ([1, 1], False),
        ([1, 0], True),
    ],
)
def test_unsafe_means_several_sampled_frames_in_a_row(content, scores, safe):
    video = _video(scores)
    frames, verdict = content.check(video, fps=2)
    assert verdict.safe is safe
    assert verdict.scores["sampled"] == len(scores)
    assert frames is video


def test_the_packaged_detector_finds_nothing_in_a_portrait():
    skimage_data = pytest.importorskip("skimage.data")
    portrait = skimage_data.astronaut()[::2, ::2]
    _, verdict = ContentFilter().check(portrait[None], fps=1)
    assert verdict.safe
    assert verdict.scores["highest"] < 0.3


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.0}, {"consecutive": 0}, {"sample_fps": 0.0}])
def test_settings_that_find_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="threshold"):
        ContentFilterConfig(**wrong)
