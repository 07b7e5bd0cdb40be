from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.evaluation.metrics import psnr, ssim
from nemo_cosmos.evaluation.reconstruction import PERCEPTUAL_CROP, VideoMeter, mean_seams


class MeanBrightness:
    """Stands for the feature network: one number per clip."""

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        return np.array([len(frames), frames.mean()])


@pytest.fixture
def video(moving_square) -> np.ndarray:
    return moving_square(seed=0, speed=1.0, num_frames=36, size=32)


def _shifted(video: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Adds to each frame its own number of grey levels."""
    return (video + levels[:, None, None, None]).clip(0, 255).astype(np.uint8)


def test_a_video_in_pieces_measures_as_the_whole(video, mean_difference):
    rebuilt = _shifted(video, np.arange(36) % 5 - 2)
    whole = VideoMeter(36, perceptual=mean_difference, features=MeanBrightness())
    whole.add(video, rebuilt)
    pieces = VideoMeter(36, perceptual=mean_difference, features=MeanBrightness())
    for span in (slice(0, 17), slice(17, 33), slice(33, 36)):
        pieces.add(video[span], rebuilt[span])
    expected = whole.finish(name="a", source="b", bits=36 * 32 * 32)
    assert pieces.finish(name="a", source="b", bits=36 * 32 * 32) == expected
    np.testing.assert_array_equal(pieces.features, whole.features)
    assert expected.psnr_db == pytest.approx(psnr(video, rebuilt).mean())
    assert expected.ssim == pytest.approx(ssim(video, rebuilt).mean())
    seen = [0, 18, 35]
    assert expected.lpips_like == pytest.approx(mean_difference.frames(video[seen], [rebuilt[seen]]).mean())
    assert (expected.num_frames, expected.height, expected.width, expected.bits_per_pixel) == (36, 32, 32, 1.0)
    np.testing.assert_array_equal(whole.middle, (video[18], rebuilt[18]))


def test_whole_clips_are_described_and_short_videos_as_one(video, mean_difference):
    meter = VideoMeter(36, perceptual=mean_difference, features=MeanBrightness())
    meter.add(video, video)
    meter.finish(name="a", source="b")
    assert [truth[0] for truth, _ in meter.features] == [16, 16]
    picture = VideoMeter(1, perceptual=mean_difference, features=MeanBrightness())
    picture.add(video[:1], video[:1])
    picture.finish(name="a", source="b")
    assert [rebuilt[0] for _, rebuilt in picture.features] == [1]


def test_a_jump_between_windows_shows_in_the_change_alone(video, mean_difference):
    """Windows of 9 that are too bright and too dark by turns: every frame is as good, the joints are not."""
    meter = VideoMeter(36, perceptual=mean_difference, window_frames=9)
    base = (video // 2) + 40
    meter.add(base, _shifted(base, np.where(np.arange(36) // 9 % 2, -3, 3)))
    seams = meter.finish(name="a", source="b").seams
    assert (seams.window_frames, seams.num_joints) == (9, 3)
    level = 20 * np.log10(255 / 3)
    assert seams.psnr_at_joints_db == pytest.approx(level)
    assert seams.psnr_elsewhere_db == pytest.approx(level)
    assert seams.change_at_joints_db == pytest.approx(20 * np.log10(255 / 6))
    assert seams.step_at_joints_db == pytest.approx(0, abs=1e-9)
    # Elsewhere the error does not change at all.
    assert seams.change_elsewhere_db > 90


def test_frames_beside_a_joint_are_told_from_the_others(video, mean_difference):
    levels = np.full(36, 1)
    levels[[8, 9]] = 4
    meter = VideoMeter(36, perceptual=mean_difference, window_frames=9)
    base = (video // 2) + 40
    meter.add(base, _shifted(base, levels))
    found = meter.finish(name="a", source="b")
    single, quadruple = 20 * np.log10(255), 20 * np.log10(255 / 4)
    assert found.seams.psnr_at_joints_db == pytest.approx((2 * quadruple + 4 * single) / 6)
    assert found.seams.psnr_elsewhere_db == pytest.approx(single)
    # The joint between frames 8 and 9 lies inside the bad stretch; its two edges are elsewhere.
    assert found.seams.step_at_joints_db == pytest.approx(0, abs=1e-9)
    assert found.seams.step_elsewhere_db == pytest.approx(2 * (single - quadruple) / 32)
    assert mean_seams([found, found]).num_joints == 6
    assert mean_seams([found, found]).psnr_at_joints_db == pytest.approx(found.seams.psnr_at_joints_db)


def test_a_video_of_one_window_has_no_seams(video, mean_difference):
    meter = VideoMeter(17, perceptual=mean_difference)
    meter.add(video[:17], video[:17])
    found = meter.finish(name="a", source="b")
    assert found.seams is None
    assert mean_seams([found]) is None


def test_the_perceptual_measure_sees_the_middle_of_large_frames():
    class Size:
        def frames(self, truth, predictions):
            return np.full((1, 1), truth.shape[1] * 1000 + truth[0, 0, 0, 0])

    large = np.zeros((1, PERCEPTUAL_CROP + 20, 32, 3), np.uint8)
    large[:, 10:] = 7
    meter = VideoMeter(1, perceptual=Size())
    meter.add(large, large)
    assert meter.finish(name="a", source="b").lpips_like == PERCEPTUAL_CROP * 1000 + 7
