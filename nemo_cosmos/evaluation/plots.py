"""Figures for reports, drawn without a display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nemo_cosmos.evaluation.rate_distortion import RatePoint
    from nemo_cosmos.evaluation.video_prediction import PredictionEvaluation

_SMOOTHING = 0.9


def read_losses(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a training log: one JSON object per line with `step` and `loss`; lines without a loss are passed over.

    When a run was resumed, steps trained again appear twice and the later line counts.

    Returns:
        Steps int64 [N], rising, and losses float64 [N].

    Raises:
        UserError: The file is missing, holds no loss, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise user_error("loss log", str(path), "an existing JSONL file", "Run the training that writes it.")
    losses: dict[int, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}). Remove that line.") from error
        if "loss" in entry:
            losses[int(entry["step"])] = float(entry["loss"])
    if not losses:
        raise user_error("loss log", str(path), "at least one line with `loss`", "Run the training that writes it.")
    steps = sorted(losses)
    return np.array(steps), np.array([losses[step] for step in steps])


def loss_curve(logs: Mapping[str, str | Path]) -> Figure:
    """Draws losses over steps: each value faint, and an exponential mean over about 10 steps.

    Args:
        logs: JSONL files by the name shown.
    """
    figure, axes = _figure("step", "loss")
    for i, (name, path) in enumerate(logs.items()):
        steps, losses = read_losses(path)
        axes.plot(steps, losses, color=f"C{i}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color=f"C{i}", label=name)
    axes.legend(frameon=False)
    return figure


def per_frame_curves(evaluation: PredictionEvaluation, measure: str = "PSNR") -> Figure:
    """Draws one measure of all methods over the frame number."""
    figure, axes = _figure("frame", f"{measure} (dB)" if measure == "PSNR" else measure)
    for result in evaluation.methods:
        values = result.measure(measure)
        axes.plot(values.frames, values.per_frame, marker="o", markersize=3, label=result.method)
    axes.legend(frameon=False)
    return figure


def interval_chart(evaluation: PredictionEvaluation, measure: str = "PSNR") -> Figure:
    """Draws the mean of one measure per method with its 95% interval; the axis starts near the lowest interval."""
    figure, axes = _figure(f"{measure} (dB)" if measure == "PSNR" else measure, "")
    intervals = [result.measure(measure).over_videos for result in evaluation.methods]
    names = [result.method for result in evaluation.methods]
    for i, (name, interval) in enumerate(zip(names, intervals, strict=True)):
        spread = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axes.errorbar([interval.mean], [name], xerr=spread, fmt="o", capsize=4, color=f"C{i}", markersize=7)
    axes.invert_yaxis()
    axes.margins(y=0.25)
    return figure


def rate_distortion_chart(
    curves: Mapping[str, Sequence[RatePoint]], *, name: str, point: RatePoint, videos: Sequence[RatePoint] = ()
) -> Figure:
    """Draws PSNR over bits per pixel, the rate on a logarithmic axis.

    Args:
        curves: Of codecs, by name.
        name: Of the tokenizer.
        point: Its mean, drawn large.
        videos: Its point for each video, drawn faint.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _figure("bits per pixel", "PSNR (dB)")
    for codec, curve in curves.items():
        rates, values = zip(*((p.bits_per_pixel, p.psnr_db) for p in curve), strict=True)
        axes.plot(rates, values, marker="o", markersize=3.5, label=codec)
    color = f"C{len(curves)}"
    if len(videos) > 1:
        rates, values = zip(*((p.bits_per_pixel, p.psnr_db) for p in videos), strict=True)
        axes.scatter(rates, values, color=color, alpha=0.5, s=24, linewidths=0, label=f"{name}, each video")
    axes.plot([point.bits_per_pixel], [point.psnr_db], color=color, marker="*", markersize=13, linestyle="", label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    return figure


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean, corrected for its start."""
    smoothed, mean, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed[i] = mean / weight
    return smoothed
