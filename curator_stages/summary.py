"""The figures of a finished run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_cosmos.contracts import ClipRecord, Record

STAGE_ORDER = (
    "read",
    "executor",
    "shot_split",
    "transcode",
    "motion_filter",
    "quality",
    "overlay_text",
    "aesthetic_filter",
    "video_type",
    "caption",
    "perceptual_hash",
    "preview",
    "embed",
    "text_embed",
    "exact_dedup",
    "perceptual_dedup",
    "semantic_dedup",
    "write",
    "statistics",
)


@dataclass(frozen=True, kw_only=True)
class CurationSummary(Record):
    """What `curate` gives back, and `report.json`. Paths are relative to the output folder."""

    output_dir: str
    manifest: str
    report_html: str
    report_json: str
    statistics_json: str
    shards: tuple[str, ...]
    num_videos: int
    num_clips: int
    """All rows of the manifest, rejected ones included."""
    num_kept: int
    kept_seconds: float
    """Length of all kept clips together."""
    left_out_s: float = 0.0
    """Length of the video that `max_clips_per_video` left out."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Number of files that are no videos by their suffix, and no sidecars, by suffix."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of clips by the stage that rejected them."""
    kept_by_source: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Working time by stage, over all runs that took part."""
    unchanged: bool = False
    """Whether this call found everything done already."""


def summarise(
    output_dir: str, records: Sequence[ClipRecord], seconds: dict[str, float], passed_over: dict[str, int]
) -> CurationSummary:
    """Counts records."""
    kept = [r for r in records if r.rejected_by is None]
    return CurationSummary(
        output_dir=output_dir,
        manifest="manifest.parquet",
        report_html="report.html",
        report_json="report.json",
        statistics_json="statistics.json",
        shards=tuple(sorted({r.shard for r in kept if r.shard})),
        num_videos=len({r.source_video for r in records}),
        num_clips=len(records),
        num_kept=len(kept),
        kept_seconds=round(sum(r.num_frames / r.fps for r in kept), 3),
        left_out_s=round(sum(r.scores.get("left_out_s", 0.0) for r in records), 3),
        passed_over=dict(sorted(passed_over.items())),
        rejected=dict(sorted(Counter(r.rejected_by for r in records if r.rejected_by).items())),
        kept_by_source=dict(sorted(Counter(r.source for r in kept).items())),
        seconds={name: round(seconds[name], 3) for name in STAGE_ORDER if name in seconds},
    )


def told_by_suffix(passed_over: dict[str, int]) -> str:
    """Puts `CurationSummary.passed_over` into words."""
    return ", ".join(f"{number:,} files with {suffix}" for suffix, number in passed_over.items())
