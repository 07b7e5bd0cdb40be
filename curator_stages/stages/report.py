"""Report: what happened to every clip, as one HTML page and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.dedup.clips import DUPLICATE_TAG
from curator_stages.report_figures import funnel, histograms, stage_times
from curator_stages.stages.statistics import statistics_by_source, statistics_of
from curator_stages.summary import STAGE_ORDER, CurationSummary, summarise, told_by_suffix
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.files import write_json
from nemo_cosmos.html_page import Cell, Page

_MOST_THUMBNAILS = 12
_MOST_SAMPLES = 4
_MOST_SAMPLE_BYTES = 4 << 20
"""Of one sample clip: larger ones are left out, since the page holds them all."""
_MOST_GROUPS = 12
_MOST_IN_GROUP = 8


@dataclass
class ReportStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Writes `report.html` and `report.json`."""

    output_dir: str
    seconds: dict[str, float]
    """Working time of the stages that ran before, by name."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Files of the input that are no videos by their suffix, by suffix."""
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
        summary = summarise(self.output_dir, [clip.record for clip in task.data], seconds, self.passed_over)
        output = Path(self.output_dir)
        build_page(summary, task.data).write(output / summary.report_html)
        write_json(output / summary.report_json, summary.to_dict())
        return task


def build_page(summary: CurationSummary, clips: list[StoredClip]) -> Page:
    """Lays out the page: figures, funnel, histograms, pictures and samples by decision, near-duplicates, time."""
    records = [clip.record for clip in clips]
    rejected = summary.num_clips - summary.num_kept
    page = Page("Curation report", f"{summary.num_videos} videos became {summary.num_clips} clips.")
    page.tiles(
        [
            ("clips kept", f"{summary.num_kept:,}"),
            ("rejected", f"{rejected:,}"),
            ("of all clips kept", f"{summary.num_kept / max(1, summary.num_clips):.0%}"),
            ("minutes of video kept", f"{summary.kept_seconds / 60:.1f}"),
            ("shards", f"{len(summary.shards):,}"),
            *([("minutes left out", f"{summary.left_out_s / 60:.1f}")] if summary.left_out_s else []),
        ]
    )
    page.section("Funnel")
    page.image(funnel(_steps(clips)), "Clips that each stage left of those it was given.")
    if rejected:
        page.table(["stage", "reason", "clips"], _reasons(clips))
    if summary.passed_over:
        page.text(f"Passed over, for they are no videos by their suffix: {told_by_suffix(summary.passed_over)}.")
    _add_statistics(page, records)
    page.section("Length and scores").image(histograms(records), "All clips that were measured, rejected ones on top.")
    _add_decision(page, "Kept clips", [c for c in clips if c.record.rejected_by is None])
    for stage in _deciding(clips):
        _add_decision(page, f"Rejected by {stage}", [c for c in clips if c.record.rejected_by == stage])
    _add_groups(page, clips)
    _add_times(page, summary, clips)
    return page


def _deciding(clips: list[StoredClip]) -> list[str]:
    """Returns the stages that rejected anything, in the order in which they run."""
    order = {name: number for number, name in enumerate(STAGE_ORDER)}
    stages = {c.record.rejected_by for c in clips if c.record.rejected_by}
    return sorted(stages, key=lambda name: (order.get(name, len(order)), name))


def _steps(clips: list[StoredClip]) -> list[tuple[str, int, int]]:
    steps = [("all clips", len(clips), 0)]
    for stage in _deciding(clips):
        left = steps[-1][1] - steps[-1][2]
        steps.append((stage, left, sum(c.record.rejected_by == stage for c in clips)))
    return steps


def _reasons(clips: list[StoredClip]) -> list[list[str | int]]:
    rows: list[list[str | int]] = []
    for stage in _deciding(clips):
        counted = Counter(_kind(c) for c in clips if c.record.rejected_by == stage)
        rows += [[stage, reason, number] for reason, number in counted.most_common()]
    return rows


def _kind(clip: StoredClip) -> str:
    """Returns a reason without the figures and names that differ from clip to clip."""
    reason = re.sub(r"\b[0-9a-f]{16}\b", "a kept clip", clip.record.rejected_reason or "")
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "…", reason)


def _add_statistics(page: Page, records: list[ClipRecord]) -> None:
    """Adds the totals by source, and the buckets of kept clips."""
    total, by_source = statistics_of(records), statistics_by_source(records)
    told = [*by_source.items(), *([("all", total)] if len(by_source) > 1 else [])]
    page.section("Sources")
    rows: list[list[Cell]] = [
        [name, s.videos, s.hours, s.clips, s.kept_clips, f"{s.kept_ratio:.0%}", s.kept_hours, s.heldout_clips]
        for name, s in told
    ]
    page.table(["source", "videos", "hours", "clips", "kept", "kept of all", "kept hours", "held out"], rows)
    rows = [
        [name, s.clips_with_actions, s.captioned_clips, s.caption_windows, s.caption_characters, s.caption_words]
        for name, s in told
    ]
    page.table(["kept clips of", "with actions", "with captions", "captions", "characters each", "words each"], rows)
    buckets = {"shorter side": total.resolutions, "width:height": total.aspect_ratios, "frames": total.lengths}
    joined = {"width:height": ":", "frames": " to "}
    rows = [
        [kind, name.replace("_", joined.get(kind, "")), number]
        for kind, found in buckets.items()
        for name, number in found.items()
    ]
    if rows:
        page.table(["kept clips by", "", "clips"], rows)


def _add_decision(page: Page, title: str, clips: list[StoredClip]) -> None:
    """Adds pictures of some clips that met the same decision, a few of them as videos, and names those without."""
    if not clips:
        return
    page.section(title)
    pictured = [c for c in clips if c.file(".jpg").is_file()]
    if unseen := [c for c in clips if not c.file(".jpg").is_file()]:
        some = _spread(unseen, _MOST_THUMBNAILS)
        page.text(f"{len(unseen)} without a picture" + (f", {len(some)} of them:" if len(some) < len(unseen) else ":"))
        page.table(["video", "reason"], [[c.record.source_video, c.record.rejected_reason] for c in some])
    if not pictured:
        return
    page.gallery([(_picture(c), _label(c)) for c in _spread(pictured, _MOST_THUMBNAILS)], min_width_px=180)
    playable = [c for c in pictured if c.file(".mp4").is_file() and c.file(".mp4").stat().st_size < _MOST_SAMPLE_BYTES]
    if playable:
        samples = [(c.file(".mp4"), c.record.source_video) for c in _spread(playable, _MOST_SAMPLES)]
        page.videos(samples, min_width_px=200)


def _picture(clip: StoredClip) -> Path:
    """Returns the clip's preview, or a still picture where it has none."""
    preview = clip.file(".webp")
    return preview if preview.is_file() else clip.file(".jpg")


def _spread(clips: list[StoredClip], most: int) -> list[StoredClip]:
    """Picks clips evenly over the whole list, so that every source is seen."""
    places = np.unique(np.linspace(0, len(clips) - 1, min(most, len(clips))).round().astype(int))
    return [clips[i] for i in places]


def _label(clip: StoredClip) -> str:
    record = clip.record
    parts = [record.source_video, f"frames {record.start_frame} to {record.start_frame + record.num_frames}"]
    if record.rejected_reason:
        parts.append(record.rejected_reason)
    elif record.captions:
        parts.append(record.captions[0].text)
    return " · ".join(parts)


def _add_groups(page: Page, clips: list[StoredClip]) -> None:
    """Adds groups of duplicates side by side, the kept one first."""
    groups: dict[str, list[StoredClip]] = {}
    for clip in clips:
        for tag in clip.record.tags:
            if tag.startswith(DUPLICATE_TAG):
                groups.setdefault(tag.removeprefix(DUPLICATE_TAG), []).append(clip)
    if not groups:
        return
    by_id = {c.record.clip_id: c for c in clips}
    page.section("Near-duplicates")
    largest = sorted(groups, key=lambda kept: (-len(groups[kept]), kept))[:_MOST_GROUPS]
    page.text(f"{len(groups)} groups; the {len(largest)} largest ones, with the kept clip at the left.")
    for kept in largest:
        members = [(by_id[kept], f"kept · {_size(by_id[kept])}")]
        members += [(c, f"{c.record.rejected_by} · {_size(c)} · {_likeness(c)}") for c in groups[kept]]
        pictures = [(c.file(".jpg"), told) for c, told in members if c.file(".jpg").is_file()]
        page.gallery(pictures[:_MOST_IN_GROUP], min_width_px=160)


def _size(clip: StoredClip) -> str:
    record = clip.record
    size = f"{record.scores['source_width']:.0f}x{record.scores['source_height']:.0f}"
    return f"{record.source_video} from frame {record.start_frame} · {size}"


def _likeness(clip: StoredClip) -> str:
    scores = clip.record.scores
    if "dedup_similarity" in scores:
        return f"similarity {scores['dedup_similarity']:.3f}"
    if "dedup_hash_distance" in scores:
        return f"{scores['dedup_hash_distance']:.0f} bits differ"
    return "the same pictures"


def _add_times(page: Page, summary: CurationSummary, clips: list[StoredClip]) -> None:
    if not summary.seconds:
        return
    video_s = sum(c.record.num_frames / c.record.fps for c in clips if c.record.num_frames)
    stored_mb = sum(c.file(".mp4").stat().st_size for c in clips if c.file(".mp4").is_file()) / 1e6
    page.section("Throughput").image(stage_times(summary.seconds), "Working time by stage, of all workers together.")
    rows = [
        [name, seconds, *(amount / seconds if seconds else None for amount in (len(clips), video_s, stored_mb))]
        for name, seconds in summary.seconds.items()
    ]
    page.table(["stage", "seconds", "clips/s", "video s/s", "stored MB/s"], rows)
