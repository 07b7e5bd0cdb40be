"""Overlay text: how much of the picture is text that stays, such as subtitles, logos and captions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.tasks import ClipsTask
from curator_stages.text_detector import TextDetector

_MOST_SAMPLES = 4
_STAYS = 0.75
"""Share of the looked-at pictures that have text in a place for it to count as staying there."""


@dataclass
class OverlayTextStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Measures text and rejects clips with much of it that stays in its place.

    Scores are shares of the picture: `text_area`, the mean over some samples, and `overlay_text_area`, what is text in
    three quarters of them. A sign in a scene that does not move stays in its place too.
    """

    config: CurationConfig
    name: str = "overlay_text"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where the network runs on one."""
        self.resources = with_gpus(self.resources, network_gpus(self.config.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with samples."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, scored."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads the detector."""
        self._detector = TextDetector(self.config.device)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Measures the kept clips of one span."""
        limit = self.config.overlay_text_max_area
        for clip in task.kept():
            with failing_alone(clip, self.name):
                pictures = clip.some_samples(_MOST_SAMPLES)
                area, staying = text_areas(self._detector.masks(_of_one_size(pictures)))
                scores = {"text_area": area, "overlay_text_area": staying}
                clip.record = replace(clip.record, scores=clip.record.scores | scores)
                if limit is not None and staying > limit:
                    clip.reject(self.name, f"overlay text: overlay_text_area {staying:.3f} is above {limit:g}")
        return task


def text_areas(masks: np.ndarray) -> tuple[float, float]:
    """Bool [N, h, w] -> mean share of text, and share of what is text in most of the pictures."""
    presence = masks.mean(axis=0)
    return float(presence.mean()), float((presence >= _STAYS).mean())


def _of_one_size(pictures: list[np.ndarray]) -> np.ndarray:
    """Stacks pictures; a source may change its size on the way."""
    import cv2

    height, width = pictures[0].shape[:2]
    return np.stack([p if p.shape[:2] == (height, width) else cv2.resize(p, (width, height)) for p in pictures])
