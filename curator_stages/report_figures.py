"""Figures of the curation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.contracts import ClipRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, REJECTED, REST = "#3a7d12", "#c0562f", "#e6ebf0"
_COLUMNS = 3


def funnel(steps: Sequence[tuple[str, int, int]]) -> Figure:
    """Draws how many clips each stage left of those it was given.

    Args:
        steps: Stage, clips given, clips rejected; in order.
    """
    figure = _figure(9.5, 0.55 + 0.42 * len(steps))
    axes = figure.subplots()
    total = max(steps[0][1], 1)
    for row, (_, given, rejected) in enumerate(steps):
        left = given - rejected
        axes.barh(row, total, color=REST, height=0.72)
        axes.barh(row, left, color=KEPT, height=0.72)
        axes.barh(row, rejected, left=left, color=REJECTED, height=0.72)
        told = f"{left:,} left" + (f",  {rejected:,} rejected" if rejected else "")
        axes.text(total * 1.015, row, told, va="center", fontsize=9.5, color="#1d2430")
    axes.set_yticks(range(len(steps)), [name.replace("_", " ") for name, _, _ in steps])
    axes.invert_yaxis()
    axes.set_xlim(0, total * 1.28)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return figure


def histograms(records: Sequence[ClipRecord]) -> Figure:
    """Draws the length of all clips and every score, rejected clips on top of kept ones."""
    measured = {"length (s)": [(r.num_frames / r.fps, r.rejected_by is None) for r in records if r.num_frames]}
    for name in sorted({name for r in records for name in r.scores}):
        measured[name] = [(r.scores[name], r.rejected_by is None) for r in records if name in r.scores]
    measured = {name: values for name, values in measured.items() if values}
    rows = max(1, -(-len(measured) // _COLUMNS))
    figure = _figure(10.5, 2.5 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes, (name, values) in zip(grid, measured.items(), strict=False):
        kept, rejected = ([value for value, is_kept in values if is_kept is which] for which in (True, False))
        bins = _bins([value for value, _ in values])
        axes.hist([kept, rejected], bins, stacked=True, color=[KEPT, REJECTED], label=["kept", "rejected"])
        axes.set_title(name.replace("_", " "), fontsize=9.5)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.locator_params(axis="y", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(measured) :]:
        axes.set_visible(False)
    if measured:
        grid[0].legend(fontsize=8, frameon=False)
    return figure


def _bins(values: list[float]) -> np.ndarray:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 31)


def stage_times(seconds: Mapping[str, float]) -> Figure:
    """Draws each stage's share of the working time."""
    figure = _figure(9.5, 0.45 + 0.36 * len(seconds))
    axes = figure.subplots()
    total = sum(seconds.values()) or 1.0
    for row, value in enumerate(seconds.values()):
        axes.barh(row, value, color="#2f6f9f", height=0.7)
        axes.text(value + 0.01 * total, row, f"{value / total:.0%}", va="center", fontsize=9, color="#1d2430")
    axes.set_yticks(range(len(seconds)), [name.replace("_", " ") for name in seconds])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of work", fontsize=9)
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
