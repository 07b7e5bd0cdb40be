"""Quality: sharpness, contrast, exposure and blockiness, measured on pictures of the source's own size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages import quality
from curator_stages.config import CurationConfig
from curator_stages.decode import SAMPLE_SIDE
from curator_stages.faults import failing_alone
from curator_stages.tasks import Clip, ClipsTask

_MOST_SAMPLES = 4


@dataclass
class QualityStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives clips the scores `sharpness`, `contrast`, `clipped` and `blockiness`, medians over some of their samples.

    `blockiness` is absent where the source is larger than its samples, which are then scaled down. Clips below
    `min_sharpness` or above `max_clipped` are rejected.
    """

    config: CurationConfig
    name: str = "quality"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with samples."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, scored."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Scores the kept clips of one span."""
        config = self.config
        for clip in task.kept():
            with failing_alone(clip, self.name):
                scores = _scores_of(clip)
                clip.record = replace(clip.record, scores=clip.record.scores | scores)
                if config.min_sharpness is not None and scores["sharpness"] < config.min_sharpness:
                    clip.reject(
                        self.name, f"blurred: sharpness {scores['sharpness']:.1f} is below {config.min_sharpness:g}"
                    )
                elif config.max_clipped is not None and scores["clipped"] > config.max_clipped:
                    clip.reject(
                        self.name, f"badly exposed: clipped {scores['clipped']:.2f} is above {config.max_clipped:g}"
                    )
        return task


def _scores_of(clip: Clip) -> dict[str, float]:
    import cv2

    lumas = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in clip.some_samples(_MOST_SAMPLES)]
    measures = {"sharpness": quality.sharpness, "contrast": quality.contrast, "clipped": quality.clipped}
    if max(clip.record.scores["source_height"], clip.record.scores["source_width"]) <= SAMPLE_SIDE:
        measures["blockiness"] = quality.blockiness
    return {name: float(np.median([measure(luma) for luma in lumas])) for name, measure in measures.items()}
