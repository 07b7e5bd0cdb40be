from __future__ import annotations

import json

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.metrics import psnr
from nemo_cosmos.evaluation.video_prediction import (
    PredictionEvaluation,
    bootstrap_interval,
    evaluate_predictions,
    paired_difference,
    prediction_rows,
    repeat_last_frame,
)


def test_repeat_last_frame(moving_square):
    video = moving_square(seed=0, speed=2, num_frames=5, size=32)
    repeated = repeat_last_frame(video[:2], 5)
    np.testing.assert_array_equal(repeated[:2], video[:2])
    for t in (2, 3, 4):
        np.testing.assert_array_equal(repeated[t], video[1])
    for given in (video[:0], video):
        with pytest.raises(ValueError, match="repeat_last_frame"):
            repeat_last_frame(given, 4)


def test_the_given_frames_are_not_scored_and_the_better_method_wins(evaluation_of, moving_square):
    evaluation = evaluation_of({"close": 2.4, "far": 0.5})
    assert evaluation.num_videos == 6
    close = evaluation.method("close").measure("PSNR")
    assert close.frames == tuple(range(1, 17))
    for method in ("far", "repeat last frame"):
        for measure, sign in (("PSNR", 1), ("SSIM", 1), ("LPIPS-like", -1)):
            difference = paired_difference(evaluation, "close", method, measure)
            assert sign * difference.mean > 0
            assert min(sign * difference.low, sign * difference.high) > 0

    truth = [moving_square(seed=seed, speed=2.5) for seed in range(6)]
    wanted = [psnr(video, moving_square(seed=seed, speed=2.4))[1:].mean() for seed, video in enumerate(truth)]
    np.testing.assert_allclose(close.per_video, wanted)
    assert close.over_videos.mean == pytest.approx(np.mean(wanted))
    assert np.mean(close.per_frame) == pytest.approx(np.mean(wanted))


def test_the_perceptual_measure_can_be_thinned_out(mean_difference, moving_square):
    truth = [moving_square(seed=0, speed=2.5)]
    full, thin = (
        evaluate_predictions(
            truth,
            {"still": [repeat_last_frame(truth[0][:1], 17)]},
            perceptual=mean_difference,
            perceptual_stride=stride,
        )
        .method("still")
        .measure("LPIPS-like")
        for stride in (1, 6)
    )
    assert thin.frames == (4, 10, 16)
    assert thin.per_frame == pytest.approx([full.per_frame[frame - 1] for frame in thin.frames])


def test_bootstrap_interval_is_seeded_and_has_the_right_width():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values, seed=5)
    assert interval == bootstrap_interval(values, seed=5)
    assert interval != bootstrap_interval(values, seed=6)
    # The mean of 400 values varies with sigma / 20; 2000 resamples know its quantiles to some per cent.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert interval.low < interval.mean == values.mean() < interval.high


def test_the_evaluation_goes_through_json(evaluation_of):
    evaluation = evaluation_of({"close": 2.4}, num_videos=2)
    assert PredictionEvaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_prediction_rows_fit_their_headers(evaluation_of):
    headers, rows = prediction_rows(evaluation_of({"close": 2.4}, num_videos=2))
    assert headers[:3] == ["method", "PSNR", "PSNR 95%"]
    assert [row[0] for row in rows] == ["close", "repeat last frame"]
    assert all(len(row) == len(headers) for row in rows)


@pytest.mark.parametrize(
    ("predictions", "skip", "message"),
    [
        ({}, 1, "predictions"),
        ({"a": 1}, 1, "predictions"),
        ({"a": 2, "b": 3}, 1, "predictions"),
        ({"a": 2}, 5, "skip_frames"),
    ],
)
def test_missing_videos_and_nothing_to_score_are_refused(predictions, skip, message, mean_difference, moving_square):
    video = moving_square(seed=0, speed=2, num_frames=5, size=32)
    given = {name: [video] * count for name, count in predictions.items()}
    with pytest.raises(UserError, match=message):
        evaluate_predictions([video] * 2, given, skip_frames=skip, perceptual=mean_difference)


def test_a_prediction_of_another_length_is_refused(mean_difference, moving_square):
    video = moving_square(seed=0, speed=2, num_frames=5, size=32)
    with pytest.raises(UserError, match="videos to compare"):
        evaluate_predictions([video], {"a": [video[:4]]}, perceptual=mean_difference)
