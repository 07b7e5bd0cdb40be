"""The quickstart's report: one summary record, shown as a self-contained HTML page and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cosmos.contracts import Record, Verdict
from nemo_cosmos.evaluation.plots import interval_chart, loss_curve, per_frame_curves
from nemo_cosmos.evaluation.video_prediction import (
    MEASURES,
    PredictionEvaluation,
    paired_difference,
    prediction_rows,
)
from nemo_cosmos.html_page import Cell, Page, format_cell

if TYPE_CHECKING:
    from rich.console import Console

_CHART_WIDTH_PX = 420
_BEST = {measure: "max" if higher else "min" for measure, higher in MEASURES.items()}


@dataclass(frozen=True, kw_only=True)
class StepSummary(Record):
    """One step of the road."""

    name: str
    seconds: float
    peak_memory_mb: float
    measures: dict[str, float | str] = field(default_factory=dict)
    """What the step reports of itself, by name."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRow(Record):
    """Reconstruction by one method on held-out clips."""

    method: str
    num_stored: int
    """Numbers kept per clip."""
    psnr_db: float
    ssim: float
    lpips_like: float | None = None


@dataclass(frozen=True, kw_only=True)
class MediaFile(Record):
    """A PNG, JPEG, mp4 or JSONL file to show; relative paths are read from the report's folder."""

    path: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class QuickstartSummary(Record):
    """All that the report shows."""

    command: str
    machine: dict[str, str]
    """What the run took place on, in words, by name; see `resources.describe_machine`."""
    steps: tuple[StepSummary, ...]
    tokenizer: tuple[TokenizerRow, ...] = ()
    loss_logs: tuple[MediaFile, ...] = ()
    """JSONL training logs with `step` and `loss`; the caption names the curve."""
    prediction: PredictionEvaluation | None = None
    """Held-out rollouts: the model first, then its baselines."""
    action_sensitivity: PredictionEvaluation | None = None
    """The same model with the right actions first, then with shuffled ones."""
    frame_sheets: tuple[MediaFile, ...] = ()
    videos: tuple[MediaFile, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def write_report(path: str | Path, summary: QuickstartSummary) -> Path:
    """Writes the HTML report.

    Args:
        path: The file to write; relative media paths are read from its folder.
        summary: What to show; parts that are empty are left out.

    Returns:
        The path written.

    Raises:
        UserError: A picture, video or log is missing, or the disk is full.
    """
    path = Path(path)
    page = Page(
        "nemo-cosmos quickstart",
        f"From real video to a generated, guarded and measured video in {_duration(_total_s(summary))}.",
    )
    page.text(f"Made by: {summary.command}")
    page.section("Steps").table(*step_rows(summary))
    if summary.frame_sheets or summary.videos:
        page.section("What it generates")
        for sheet in summary.frame_sheets:
            page.image(path.parent / sheet.path, sheet.caption)
        page.videos([(path.parent / video.path, video.caption) for video in summary.videos])
    if summary.prediction:
        _add_prediction(page, summary.prediction)
    if summary.action_sensitivity:
        _add_action_sensitivity(page, summary.action_sensitivity)
    if summary.tokenizer:
        _add_tokenizer(page, summary.tokenizer)
    if summary.loss_logs:
        page.section("Training")
        curves = [(loss_curve({log.caption: path.parent / log.path}), log.caption) for log in summary.loss_logs]
        page.gallery(curves, min_width_px=_CHART_WIDTH_PX)
    if summary.verdicts:
        rows = [[v.guard, "safe" if v.safe else "UNSAFE", v.reason] for v in summary.verdicts]
        page.section("Guards").table(["guard", "verdict", "reason"], rows)
    page.section("Machine").table(["part", ""], [[name, value] for name, value in summary.machine.items()])
    return page.write(path)


def print_summary(summary: QuickstartSummary, console: Console | None = None) -> None:
    """Prints the steps and, where measured, the comparisons as tables.

    Args:
        summary: What to show.
        console: Where to print; standard output by default.
    """
    from rich.console import Console

    console = console or Console()
    _print_table(console, "Steps", *step_rows(summary))
    if summary.tokenizer:
        _print_table(console, "Tokenizer, held-out clips", *tokenizer_rows(summary.tokenizer))
    if summary.prediction:
        _print_table(console, "Prediction, held-out rollouts", *_short_prediction_rows(summary.prediction))
    if summary.action_sensitivity:
        _print_table(console, "Right and shuffled actions", *_short_prediction_rows(summary.action_sensitivity))
    if summary.verdicts:
        rows = [[v.guard, "safe" if v.safe else "UNSAFE", v.reason] for v in summary.verdicts]
        _print_table(console, "Guards", ["guard", "verdict", "reason"], rows)


def step_rows(summary: QuickstartSummary) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows of the step table, with the total."""
    rows: list[list[Cell]] = [
        [
            step.name,
            _duration(step.seconds),
            round(step.peak_memory_mb),
            ", ".join(f"{name} {format_cell(value)}" for name, value in step.measures.items()),
        ]
        for step in summary.steps
    ]
    peak = max((round(step.peak_memory_mb) for step in summary.steps), default=None)
    return ["step", "time", "peak MB", "measures"], [*rows, ["all", _duration(_total_s(summary)), peak, ""]]


def tokenizer_rows(rows: Sequence[TokenizerRow]) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows of the tokenizer table."""
    headers = ["method", "numbers per clip", *MEASURES]
    return headers, [[row.method, row.num_stored, row.psnr_db, row.ssim, row.lpips_like] for row in rows]


def _add_prediction(page: Page, evaluation: PredictionEvaluation) -> None:
    scored = evaluation.num_frames - evaluation.skip_frames
    page.section("Prediction of held-out rollouts")
    page.text(
        f"{evaluation.num_videos} rollouts that were never trained on; {scored} predicted frames of "
        f"{evaluation.num_frames} are scored, the given ones are not. Higher PSNR and SSIM and lower LPIPS-like are "
        "better. The 95% intervals are bootstrapped over rollouts."
    )
    page.table(*prediction_rows(evaluation), highlight_best=_BEST)
    _add_differences(page, evaluation)
    charts = []
    for measure in MEASURES:
        charts.append((interval_chart(evaluation, measure), f"{measure}, mean and 95% interval"))
        charts.append((per_frame_curves(evaluation, measure), f"{measure} by frame, mean over rollouts"))
    page.gallery(charts, min_width_px=_CHART_WIDTH_PX)


def _add_action_sensitivity(page: Page, evaluation: PredictionEvaluation) -> None:
    page.section("Do the actions matter?")
    page.text("The same model, first frames and noise; once with the rollout's own actions, once with shuffled ones.")
    page.table(*prediction_rows(evaluation), highlight_best=_BEST)
    _add_differences(page, evaluation)


def _add_differences(page: Page, evaluation: PredictionEvaluation) -> None:
    """Adds the first method's differences from all others, paired by video."""
    first, *others = (result.method for result in evaluation.methods)
    rows = []
    for other in others:
        row: list[Cell] = [f"{first} minus {other}"]
        for measure in MEASURES:
            difference = paired_difference(evaluation, first, other, measure)
            row.append(f"{difference.mean:+.3g} ({difference.low:+.3g} to {difference.high:+.3g})")
        rows.append(row)
    if rows:
        page.text("Differences on the same rollouts, with 95% intervals:")
        page.table(["difference", *MEASURES], rows)


def _add_tokenizer(page: Page, rows: Sequence[TokenizerRow]) -> None:
    page.section("Tokenizer")
    page.text(
        "Reconstruction of held-out clips. The baselines may keep as many numbers per clip as the tokenizer's latent: "
        "bicubic shrinks the clip in time and space and enlarges it again; the block cosine transform keeps the lowest "
        "frequencies of each block."
    )
    page.table(*tokenizer_rows(rows), highlight_best=_BEST)


def _short_prediction_rows(evaluation: PredictionEvaluation) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows that fit a terminal: the mean, and half the width of its 95% interval."""
    rows: list[list[Cell]] = []
    for result in evaluation.methods:
        intervals = (result.measure(measure).over_videos for measure in MEASURES)
        rows.append([result.method, *(f"{i.mean:.4g} ± {(i.high - i.low) / 2:.2g}" for i in intervals)])
    return ["method", *(f"{measure} ± 95%" for measure in MEASURES)], rows


def _print_table(console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, header in enumerate(headers):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(format_cell(cell)) for cell in row))
    console.print(table)


def _total_s(summary: QuickstartSummary) -> float:
    return sum(step.seconds for step in summary.steps)


def _duration(seconds: float) -> str:
    """Writes a time, with spaces that no line is broken at."""
    minutes, rest = divmod(round(seconds), 60)
    told = f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest:02d} s"
    return told.replace(" ", "\N{NO-BREAK SPACE}")
