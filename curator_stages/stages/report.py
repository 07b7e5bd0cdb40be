"""Report: what happened to every clip, as one HTML page and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.dedup.clips import DUPLICATE_TAG
from curator_stages.summary import CurationSummary, summarise
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.files import write_json
from nemo_cosmos.html_page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PICTURES = 24
_MOST_PAIRS = 12
_REJECTING_STAGES = ("read", "shot_split", "motion_filter", "exact_dedup", "perceptual_dedup", "semantic_dedup")


@dataclass
class ReportStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Writes `report.html` and `report.json`."""

    output_dir: str
    seconds: dict[str, float]
    """Working time of the stages that ran before, by name."""
    name: str = "report"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    is_resumable: bool = False

    def inputs(self) -> tuple[list[str], list[str]]:
        """All clips of a run, written."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips."""
        return ["data"], []

    def process(self, task: ClipSetTask) -> ClipSetTask:
        """Writes both reports.

        Raises:
            UserError: The disk is full or the folder is read-only.
        """
        seconds = self.seconds | {perf.stage_name: perf.process_time for perf in task._stage_perf}
        summary = summarise(self.output_dir, [clip.record for clip in task.data], seconds)
        output = Path(self.output_dir)
        build_page(summary, task.data).write(output / summary.report_html)
        write_json(output / summary.report_json, summary.to_dict())
        return task


def build_page(summary: CurationSummary, clips: list[StoredClip]) -> Page:
    """Lays out the page: funnel, histograms, thumbnails, near-duplicates, time."""
    lead = (
        f"{summary.num_videos} videos became {summary.num_clips} clips; {summary.num_kept} are kept "
        f"({summary.kept_seconds:.0f} s), {summary.num_clips - summary.num_kept} rejected."
    )
    page = Page("Curation report", lead)
    page.section("Funnel").table(["stage", "in", "rejected", "left", "most frequent reason"], _funnel(clips))
    page.table(["source", "kept", "rejected", "held out (kept)", "with actions (kept)"], _by_source(clips))
    kept = [c for c in clips if c.record.rejected_by is None]
    rejected = [c for c in clips if c.record.rejected_by is not None]
    page.section("Motion and length")
    page.image(
        _histograms(clips),
        "Left: motion of all clips that were measured, with the rejected ones on top. Right: length of kept clips.",
    )
    page.section("Kept clips").gallery(_thumbnails(kept))
    page.section("Rejected clips")
    if rejected:
        page.text("Clips without a picture held no frame that could be decoded; they are rows of the table below.")
        page.gallery(_thumbnails(rejected))
        page.table(["reason", "clips"], _reasons(rejected))
    else:
        page.text("No clip was rejected.")
    if pairs := _pairs(clips):
        page.section("Near-duplicates").text("Left the rejected clip, right the one that is kept for it.")
        page.gallery(pairs)
    page.section("Time").table(["stage", "seconds"], [[name, value] for name, value in summary.seconds.items()])
    return page


def _funnel(clips: list[StoredClip]) -> list[list[str | int]]:
    rows: list[list[str | int]] = []
    left = len(clips)
    for stage in _REJECTING_STAGES:
        reasons = [_kind(c) for c in clips if c.record.rejected_by == stage]
        common = Counter(reasons).most_common(1)[0][0] if reasons else ""
        rows.append([stage, left, len(reasons), left - len(reasons), common])
        left -= len(reasons)
    return rows


def _by_source(clips: list[StoredClip]) -> list[list[str | int]]:
    rows: list[list[str | int]] = []
    for source in sorted({c.record.source for c in clips}):
        records = [c.record for c in clips if c.record.source == source]
        kept = [r for r in records if r.rejected_by is None]
        heldout = sum(r.split == "heldout" for r in kept)
        acting = sum(r.conditions.actions is not None for r in kept)
        rows.append([source, len(kept), len(records) - len(kept), heldout, acting])
    return rows


def _kind(clip: StoredClip) -> str:
    """Returns a reason without the figures and names that differ from clip to clip."""
    reason = re.sub(r"near-duplicate of \w+ \(.*\)", "near-duplicate of a kept clip", clip.record.rejected_reason or "")
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "…", reason)


def _reasons(rejected: list[StoredClip]) -> list[list[str | int]]:
    counted = Counter(f"{c.record.rejected_by}: {_kind(c)}" for c in rejected)
    return [[reason, number] for reason, number in counted.most_common()]


def _thumbnails(clips: list[StoredClip]) -> list[tuple[Path, str]]:
    """Picks clips evenly over the whole list, so that every source is seen."""
    shown = [c for c in clips if c.file(".jpg").is_file()]
    picked = np.unique(np.linspace(0, len(shown) - 1, min(_MOST_PICTURES, len(shown))).round().astype(int))
    return [(shown[i].file(".jpg"), _label(shown[i])) for i in picked]


def _label(clip: StoredClip) -> str:
    record = clip.record
    parts = [record.source_video, f"frames {record.start_frame} to {record.start_frame + record.num_frames}"]
    if "motion_global_mean" in record.scores:
        parts.append(f"motion {record.scores['motion_global_mean']:.1e}")
    if record.rejected_reason:
        parts.append(f"{record.rejected_by}: {record.rejected_reason}")
    elif record.captions:
        parts.append(record.captions[0].text)
    return " · ".join(parts)


def _pairs(clips: list[StoredClip]) -> list[tuple[np.ndarray, str]]:
    by_id = {c.record.clip_id: c for c in clips}
    pairs = []
    for clip in clips:
        kept = [tag.removeprefix(DUPLICATE_TAG) for tag in clip.record.tags if tag.startswith(DUPLICATE_TAG)]
        if kept:
            other = by_id[kept[0]]
            similarity = clip.record.scores["dedup_similarity"]
            title = f"{clip.record.source_video} and {other.record.source_video}: cosine similarity {similarity:.4f}"
            pairs.append((np.concatenate([_picture(clip), _picture(other)], axis=1), title))
    return sorted(pairs, key=lambda pair: pair[1])[:_MOST_PAIRS]


def _picture(clip: StoredClip) -> np.ndarray:
    import cv2

    return cv2.cvtColor(cv2.imread(str(clip.file(".jpg"))), cv2.COLOR_BGR2RGB)


def _histograms(clips: list[StoredClip]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = [c.record for c in clips if "motion_global_mean" in c.record.scores]
    kept = [r.scores["motion_global_mean"] for r in measured if r.rejected_by is None]
    rejected = [r.scores["motion_global_mean"] for r in measured if r.rejected_by is not None]
    if measured:
        bins = np.linspace(0, max(kept + rejected) or 1, 31)
        left.hist([kept, rejected], bins, stacked=True, color=["#3a7d12", "#c0562f"], label=["kept", "rejected"])
        left.legend()
    left.set(xlabel="motion_global_mean (share of height + width per frame)", ylabel="clips")
    lengths = [c.record.num_frames / c.record.fps for c in clips if c.record.rejected_by is None]
    right.hist(lengths, bins=20, color="#3a7d12")
    right.set(xlabel="length (s)", ylabel="kept clips")
    return figure
