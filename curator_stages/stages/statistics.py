"""Statistics: what a set amounts to, as a whole and by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.buckets import bucket_of
from curator_stages.tasks import ClipSetTask
from nemo_cosmos.contracts import ClipRecord, Record
from nemo_cosmos.files import write_json

STATISTICS = "statistics.json"


@dataclass(frozen=True, kw_only=True)
class ClipStatistics(Record):
    """Totals of some clips."""

    videos: int
    clips: int
    """Rejected ones included."""
    hours: float
    """Length of all clips together; windows that overlap count twice."""
    kept_clips: int
    kept_hours: float
    kept_ratio: float
    """Kept clips of all clips, in [0, 1]."""
    heldout_clips: int
    """Of the kept ones."""
    clips_with_actions: int
    """Of the kept ones."""
    resolutions: dict[str, int] = field(default_factory=dict)
    """Kept clips by `buckets.Bucket.resolution`."""
    aspect_ratios: dict[str, int] = field(default_factory=dict)
    """Kept clips by `buckets.Bucket.aspect_ratio`."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Kept clips by `buckets.Bucket.frames`."""
    captioned_clips: int = 0
    """Kept clips with a caption."""
    caption_windows: int = 0
    """Captions of kept clips."""
    caption_characters: float | None = None
    """Mean length of a caption; None where there is none."""
    caption_words: float | None = None
    """The same in words."""


@dataclass
class StatisticsStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Writes `statistics.json`: `total`, and `by_source`, each as of `ClipStatistics`."""

    output_dir: str
    name: str = "statistics"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    is_resumable: bool = False

    def inputs(self) -> tuple[list[str], list[str]]:
        """All clips of a run."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips."""
        return ["data"], []

    def process(self, task: ClipSetTask) -> ClipSetTask:
        """Counts the whole set.

        Raises:
            UserError: The disk is full or the folder is read-only.
        """
        records = [clip.record for clip in task.data]
        by_source = {source: found.to_dict() for source, found in statistics_by_source(records).items()}
        told = {"total": statistics_of(records).to_dict(), "by_source": by_source}
        write_json(Path(self.output_dir) / STATISTICS, told)
        return task


def statistics_by_source(records: Sequence[ClipRecord]) -> dict[str, ClipStatistics]:
    """Counts the clips of each source, in the order of their names."""
    grouped: dict[str, list[ClipRecord]] = {}
    for record in records:
        grouped.setdefault(record.source, []).append(record)
    return {source: statistics_of(found) for source, found in sorted(grouped.items())}


def statistics_of(records: Sequence[ClipRecord]) -> ClipStatistics:
    """Counts clips."""
    kept = [r for r in records if r.rejected_by is None]
    texts = [window.text for r in kept for window in r.captions]
    buckets = [bucket_of(r) for r in kept]
    return ClipStatistics(
        videos=len({r.source_video for r in records}),
        clips=len(records),
        hours=_hours(records),
        kept_clips=len(kept),
        kept_hours=_hours(kept),
        kept_ratio=round(len(kept) / max(1, len(records)), 4),
        heldout_clips=sum(r.split == "heldout" for r in kept),
        clips_with_actions=sum(r.conditions.actions is not None for r in kept),
        resolutions=_counted(bucket.resolution for bucket in buckets),
        aspect_ratios=_counted(bucket.aspect_ratio for bucket in buckets),
        lengths=_counted(bucket.frames for bucket in buckets),
        captioned_clips=sum(bool(r.captions) for r in kept),
        caption_windows=len(texts),
        caption_characters=_mean([len(text) for text in texts]),
        caption_words=_mean([len(text.split()) for text in texts]),
    )


def _hours(records: Sequence[ClipRecord]) -> float:
    # Files that cannot be read have no frames, and perhaps no rate.
    return round(sum(r.num_frames / r.fps for r in records if r.num_frames) / 3600, 6)


def _counted(names: Iterable[str]) -> dict[str, int]:
    """Counts names of numbers, in the order of these."""
    return dict(sorted(Counter(names).items(), key=lambda item: [int(number) for number in item[0].split("_")]))


def _mean(values: Sequence[int]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None
