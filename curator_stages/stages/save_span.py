"""Save span: stores the finished clips of a span, so that a killed run does not do them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.tasks import ClipsTask, SpanTask
from curator_stages.work import WorkFolder


@dataclass
class SaveSpanStage(ProcessingStage[ClipsTask, SpanTask]):
    """Writes the result of a span aside and renames it; hands on only the span.

    Of the clips that one stage rejected, the first keeps its mp4 as a sample for the report; the others' would take
    room that nobody has a use for.
    """

    output_dir: str
    name: str = "save_span"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Finished clips."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Spans."""
        return ["data"], []

    def process(self, task: ClipsTask) -> SpanTask:
        """Stores one span."""
        rejected_by: set[str] = set()
        for clip in task.data:
            if clip.record.rejected_by in rejected_by:
                clip.mp4 = None
            elif clip.record.rejected_by is not None:
                rejected_by.add(clip.record.rejected_by)
        # The reader's time stands on each of its many spans, and would be counted once for each.
        seconds = {perf.stage_name: perf.process_time for perf in task._stage_perf if perf.stage_name != "read"}
        WorkFolder(Path(self.output_dir) / ".work").write(task.span.key, task.data, seconds)
        return SpanTask(
            dataset_name=task.dataset_name, data=task.span, _stage_perf=task._stage_perf, _metadata=task._metadata
        )
