"""Caption: what the sidecar tells, else what a captioner writes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.captioners import make_captioner
from curator_stages.conditions import slice_captions
from curator_stages.config import CurationConfig
from curator_stages.tasks import ClipsTask


@dataclass
class CaptionStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives clips their caption windows; captions find their clip by `clip_id`, never by position."""

    config: CurationConfig
    name: str = "caption"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, captioned."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Makes the captioner."""
        self._captioner = make_captioner(self.config.captioner)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Captions the kept clips of one span.

        Raises:
            ValueError: The captioner left a clip out or named one that it was not given.
        """
        told = task.span.video.captions
        silent = []
        for clip in task.kept():
            record = clip.record
            windows = slice_captions(told, record.start_frame, record.num_frames)
            clip.record = replace(record, captions=windows)
            if not windows:
                silent.append(clip)
        written = self._captioner.caption(silent)
        if set(written) != {clip.record.clip_id for clip in silent}:
            raise ValueError(
                f"captioner {self.config.captioner}: captioned clips {sorted(written)}, "
                f"expected {sorted(clip.record.clip_id for clip in silent)}"
            )
        for clip in silent:
            clip.record = replace(clip.record, captions=written[clip.record.clip_id])
        return task
