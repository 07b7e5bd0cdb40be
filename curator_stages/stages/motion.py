"""Motion filter: optical flow between neighbouring frames, whatever codec the source had."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.tasks import ClipsTask


@dataclass
class MotionFilterStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Scores the motion of each clip and rejects still ones.

    Scores as NeMo-Curator names and scales them: displacement per frame over height + width, its mean over the whole
    picture (`motion_global_mean`) and over the stillest patch (`motion_per_patch_min_256`).
    """

    config: CurationConfig
    name: str = "motion_filter"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, scored."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Scores the kept clips of one span."""
        config = self.config
        names = ("motion_global_mean", f"motion_per_patch_min_{config.motion_patch}")
        limits = (config.motion_min_global_mean, config.motion_min_per_patch)
        for clip in task.kept():
            measured = motion_scores(clip.pixels, pairs=config.motion_pairs, patch=config.motion_patch)
            scores = dict(zip(names, measured, strict=True))
            clip.record = replace(clip.record, scores=clip.record.scores | scores)
            for (name, score), limit in zip(scores.items(), limits, strict=True):
                if clip.kept and score < limit:
                    clip.reject(self.name, f"too still: {name} {score:.2e} is below {limit:.2e}")
        return task


def motion_scores(frames: np.ndarray, *, pairs: int, patch: int) -> tuple[float, float]:
    """Measures motion by dense inverse search optical flow.

    Args:
        frames: uint8 RGB [T, H, W, 3], T >= 2.
        pairs: How many pairs of neighbouring frames to look at, spread evenly.
        patch: Side of a patch in pixels; a picture smaller than that is one patch.

    Returns:
        Mean displacement per frame over (H + W), and the same over the patch where it is least.

    Source: Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search", https://arxiv.org/abs/1603.03590.
    """
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    no_guess = np.empty(0, np.float32)
    firsts = np.unique(np.linspace(0, len(frames) - 2, pairs).round().astype(int))
    height, width = frames.shape[1:3]
    total = np.zeros((height, width), np.float64)
    for first in firsts:
        before, after = (cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY) for i in (first, first + 1))
        total += np.linalg.norm(flow.calc(before, after, no_guess), axis=-1)
    share = total / len(firsts) / (height + width)
    rows, columns = max(1, height // patch), max(1, width // patch)
    patches = [p.mean() for band in np.array_split(share, rows) for p in np.array_split(band, columns, axis=1)]
    return float(share.mean()), float(min(patches))
