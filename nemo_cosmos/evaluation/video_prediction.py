"""Compares predicted videos with what really happened: means, bootstrap intervals and per-frame curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.contracts import Record
from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.metrics import check_pair, psnr, ssim

if TYPE_CHECKING:
    from nemo_cosmos.evaluation.perceptual import LpipsLike

MEASURES: Mapping[str, bool] = {"PSNR": True, "SSIM": True, "LPIPS-like": False}
"""Measures by name, and whether higher is better."""


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A mean over videos and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class MeasureResult(Record):
    """One measure of one method."""

    measure: str
    over_videos: Interval
    per_video: tuple[float, ...]
    """Mean over the scored frames of each video."""
    per_frame: tuple[float, ...]
    """Mean over the videos at each measured frame."""
    frames: tuple[int, ...]
    """Frame numbers of `per_frame`."""


@dataclass(frozen=True, kw_only=True)
class MethodResult(Record):
    """All measures of one method."""

    method: str
    measures: tuple[MeasureResult, ...]

    def measure(self, name: str) -> MeasureResult:
        """Returns one measure by name."""
        return next(result for result in self.measures if result.measure == name)


@dataclass(frozen=True, kw_only=True)
class PredictionEvaluation(Record):
    """What `evaluate_predictions` found."""

    num_videos: int
    num_frames: int
    skip_frames: int
    """Frames at the start that are given, not predicted, and not scored."""
    methods: tuple[MethodResult, ...]

    def method(self, name: str) -> MethodResult:
        """Returns one method by name."""
        return next(result for result in self.methods if result.method == name)


def repeat_last_frame(first_frames: np.ndarray, num_frames: int) -> np.ndarray:
    """The baseline that predicts no change: the given frames, then the last of them again and again.

    Args:
        first_frames: uint8 [N, H, W, 3], the frames that the model is given.
        num_frames: Length of the prediction, the given frames included.

    Returns:
        uint8 [num_frames, H, W, 3].

    Raises:
        ValueError: There is no frame, or there are more than `num_frames`.
    """
    if not 0 < len(first_frames) <= num_frames:
        raise ValueError(f"repeat_last_frame: got {len(first_frames)} frames, expected 1 to {num_frames}")
    return np.concatenate([first_frames, np.repeat(first_frames[-1:], num_frames - len(first_frames), axis=0)])


def evaluate_predictions(
    truth: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    *,
    skip_frames: int = 1,
    perceptual: LpipsLike | None = None,
    perceptual_stride: int = 1,
    seed: int = 0,
) -> PredictionEvaluation:
    """Scores several methods on the same videos.

    Args:
        truth: N videos, each uint8 [T, H, W, 3], all of one shape.
        predictions: For each method N videos in the same order.
        skip_frames: Frames at the start that every method was given.
        perceptual: Measure of likeness; loaded when not given.
        perceptual_stride: The perceptual measure looks at every so manieth scored frame, the last one included; it
            costs about 100 times as much as the others.
        seed: Of the bootstrap.

    Returns:
        Means with 95% intervals over videos, values per video, and curves over frames.

    Raises:
        UserError: Videos are missing or differ in shape, or no frame is left to score.
    """
    _check(truth, predictions, skip_frames=skip_frames)
    if perceptual is None:
        from nemo_cosmos.evaluation.perceptual import LpipsLike

        perceptual = LpipsLike()
    num_frames = len(truth[0])
    scored = np.arange(skip_frames, num_frames)
    sparse = scored[::-1][::perceptual_stride][::-1]
    distances = [
        perceptual.frames(video[sparse], [videos[i][sparse] for videos in predictions.values()])
        for i, video in enumerate(truth)
    ]
    methods = []
    for m, (name, videos) in enumerate(predictions.items()):
        values = {
            "PSNR": (scored, np.stack([psnr(a[scored], b[scored]) for a, b in zip(truth, videos, strict=True)])),
            "SSIM": (scored, np.stack([ssim(a[scored], b[scored]) for a, b in zip(truth, videos, strict=True)])),
            "LPIPS-like": (sparse, np.stack([of_video[m] for of_video in distances])),
        }
        results = (measure_over_videos(key, frames, scores, seed=seed) for key, (frames, scores) in values.items())
        methods.append(MethodResult(method=name, measures=tuple(results)))
    return PredictionEvaluation(
        num_videos=len(truth), num_frames=num_frames, skip_frames=skip_frames, methods=tuple(methods)
    )


def mean_over_runs(evaluation: PredictionEvaluation, method: str, runs: Sequence[str]) -> PredictionEvaluation:
    """Puts one method in the place of several runs of it, such as those of several seeds.

    The measures of each video are averaged over the runs first, so that the interval is one over videos, as without
    runs; more runs do not make it narrower than the videos allow.

    Args:
        evaluation: Has each run as a method of its own.
        method: Name of all of them together.
        runs: Names of the runs, at least one.
    """
    of_runs = [evaluation.method(name) for name in runs]
    measures = tuple(_mean_measure([run.measure(name) for run in of_runs]) for name in MEASURES)
    place = min(evaluation.methods.index(run) for run in of_runs)
    others = [result for result in evaluation.methods if result not in of_runs]
    others.insert(place, MethodResult(method=method, measures=measures))
    return dataclasses.replace(evaluation, methods=tuple(others))


def _mean_measure(runs: Sequence[MeasureResult]) -> MeasureResult:
    per_video = np.mean([run.per_video for run in runs], axis=0)
    return dataclasses.replace(
        runs[0],
        over_videos=bootstrap_interval(per_video),
        per_video=tuple(per_video.tolist()),
        per_frame=tuple(np.mean([run.per_frame for run in runs], axis=0).tolist()),
    )


def paired_difference(evaluation: PredictionEvaluation, method: str, baseline: str, measure: str) -> Interval:
    """Mean of method minus baseline on the same videos, with its 95% interval.

    Videos differ far more than methods do; pairing takes that away, so this interval tells whether one method is
    better where those of the single means overlap.
    """
    ours, theirs = (evaluation.method(name).measure(measure).per_video for name in (method, baseline))
    return bootstrap_interval(np.subtract(ours, theirs))


def bootstrap_interval(values: np.ndarray, *, seed: int = 0, num_resamples: int = 2000) -> Interval:
    """Mean of values [N] with its 95% percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(np.asarray(values)[picks].mean(axis=1), [0.025, 0.975])
    return Interval(mean=float(np.mean(values)), low=float(low), high=float(high))


def measure_over_videos(name: str, frames: np.ndarray, scores: np.ndarray, *, seed: int = 0) -> MeasureResult:
    """Sums up one measure of one method.

    Args:
        name: Of the measure.
        frames: Numbers of the F frames that are scored.
        scores: [N videos, F].
        seed: Of the bootstrap.
    """
    per_video = scores.mean(axis=1)
    return MeasureResult(
        measure=name,
        over_videos=bootstrap_interval(per_video, seed=seed),
        per_video=tuple(per_video.tolist()),
        per_frame=tuple(scores.mean(axis=0).tolist()),
        frames=tuple(frames.tolist()),
    )


def prediction_rows(evaluation: PredictionEvaluation) -> tuple[list[str], list[list[str | float]]]:
    """Headers and rows of a table: per measure its mean and its interval."""
    headers = ["method", *(name for measure in MEASURES for name in (measure, f"{measure} 95%"))]
    rows: list[list[str | float]] = []
    for result in evaluation.methods:
        row: list[str | float] = [result.method]
        for measure in MEASURES:
            interval = result.measure(measure).over_videos
            row += [interval.mean, f"{interval.low:.4g} to {interval.high:.4g}"]
        rows.append(row)
    return headers, rows


def _check(truth: Sequence[np.ndarray], predictions: Mapping[str, Sequence[np.ndarray]], *, skip_frames: int) -> None:
    counts = {name: len(videos) for name, videos in predictions.items()}
    if not truth or not counts or set(counts.values()) != {len(truth)}:
        raise user_error(
            "predictions", counts, f"{len(truth)} videos per method, at least one", "Predict every held-out video."
        )
    if not 0 <= skip_frames < len(truth[0]):
        raise user_error("skip_frames", skip_frames, f"less than {len(truth[0])} frames", "Leave frames to score.")
    for videos in (truth, *predictions.values()):
        for video in videos:
            check_pair(truth[0], video)
