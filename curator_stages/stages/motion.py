"""Motion filter: how much a clip moves and what its camera does, by optical flow or by the codec's motion vectors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.camera_motion import CameraMotion, describe_camera, fit_camera
from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.motion_fields import flow_fields, texture
from curator_stages.tasks import Clip, ClipsTask

_CELL = 16
"""Side in pixels of the cells that the camera is fitted to."""


@dataclass
class MotionFilterStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Scores the motion of each clip, tags its camera, and rejects clips that are still or shaken.

    Scores as NeMo-Curator names and scales them: displacement per frame over height + width, its mean over the whole
    picture (`motion_global_mean`) and over the stillest patch (`motion_per_patch_min_256`); and those of
    `CameraMotion`. The tag `motion:optical_flow` or `motion:motion_vectors` tells what they were measured by.
    """

    config: CurationConfig
    name: str = "motion_filter"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, scored and tagged."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Scores the kept clips of one span."""
        config = self.config
        for clip in task.kept():
            with failing_alone(clip, self.name):
                by_codec = config.motion_method == "motion_vectors" and bool(clip.codec_motion)
                moving = _moving_by_codec if by_codec else _moving_by_flow
                mean, least, camera = moving(clip, pairs=config.motion_pairs, patch=config.motion_patch)
                scores = {
                    "motion_global_mean": mean,
                    f"motion_per_patch_min_{config.motion_patch}": least,
                    "camera_pan": camera.pan,
                    "camera_tilt": camera.tilt,
                    "camera_zoom": camera.zoom,
                    "camera_jitter": camera.jitter,
                }
                method = "motion:motion_vectors" if by_codec else "motion:optical_flow"
                record = clip.record
                clip.record = replace(
                    record,
                    scores=record.scores | scores,
                    tags=tuple(dict.fromkeys((*record.tags, *camera.tags, method))),
                )
                if reason := self._fault_of(clip.record.scores):
                    clip.reject(self.name, reason)
        return task

    def _fault_of(self, scores: dict[str, float]) -> str | None:
        config = self.config
        for name, limit in (
            ("motion_global_mean", config.motion_min_global_mean),
            (f"motion_per_patch_min_{config.motion_patch}", config.motion_min_per_patch),
        ):
            if scores[name] < limit:
                return f"too still: {name} {scores[name]:.2e} is below {limit:.2e}"
        most = config.motion_max_jitter
        if most is not None and scores["camera_jitter"] > most:
            return f"shaken: camera_jitter {scores['camera_jitter']:.2e} is above {most:.2e}"
        return None


def motion_scores(fields: list[np.ndarray], *, rows: int, columns: int) -> tuple[float, float]:
    """Sums fields up.

    Args:
        fields: Motion [h, w, 2] as of `motion_fields`, NaN where unknown.
        rows: Patches from top to bottom.
        columns: Patches from left to right.

    Returns:
        Mean length over everything, and over the patch where it is least.
    """
    lengths = np.stack([np.linalg.norm(f, axis=-1) for f in fields])
    known = np.isfinite(lengths)
    share = np.where(known, lengths, 0).sum(axis=0), known.sum(axis=0)
    patches = []
    for total, count in zip(*(_patches(part, rows, columns) for part in share), strict=True):
        if count.sum():
            patches.append(float(total.sum() / count.sum()))
    mean = float(share[0].sum() / max(1, share[1].sum()))
    return mean, min(patches, default=0.0)


def _patches(values: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    return [p for band in np.array_split(values, rows) for p in np.array_split(band, columns, axis=1)]


def _moving_by_flow(clip: Clip, *, pairs: int, patch: int) -> tuple[float, float, CameraMotion]:
    """Looks at two neighbouring pairs of frames each in several places: jitter shows between the two."""
    frames = clip.pixels
    in_a_row = min(2, len(frames) - 1)
    places = np.linspace(0, len(frames) - 1 - in_a_row, max(1, pairs // 2)).round().astype(int)
    firsts = [np.arange(place, place + in_a_row) for place in np.unique(places)]
    fields = flow_fields(frames, np.unique(np.concatenate(firsts)))
    height, width = frames.shape[1:3]
    fits = {first: _fit_flow(field, frames[first]) for first, field in fields.items()}
    camera = describe_camera([np.stack([fits[i] for i in run]) for run in firsts], clip.record.fps)
    rows, columns = max(1, height // patch), max(1, width // patch)
    return *motion_scores(list(fields.values()), rows=rows, columns=columns), camera


def _fit_flow(field: np.ndarray, frame: np.ndarray) -> np.ndarray:
    import cv2

    # Flow is a guess where there is nothing to follow, such as a plain wall or the sky.
    weight = texture(frame)
    cells = max(1, field.shape[1] // _CELL), max(1, field.shape[0] // _CELL)
    mass = cv2.resize(weight, cells, interpolation=cv2.INTER_AREA)
    moved = cv2.resize(field * weight[..., None], cells, interpolation=cv2.INTER_AREA)
    return fit_camera(moved / np.maximum(mass, 1e-6)[..., None], mass)


def _moving_by_codec(clip: Clip, *, pairs: int, patch: int) -> tuple[float, float, CameraMotion]:
    fields = [clip.codec_motion[place] for place in sorted(clip.codec_motion)]
    rows, columns = fields[0].shape[:2]
    fields = [f for f in fields if f.shape[:2] == (rows, columns)]
    run = np.stack([fit_camera(f, np.ones((rows, columns))) for f in fields])
    camera = describe_camera([run], clip.record.fps)
    patches = max(1, rows * _CELL // patch), max(1, columns * _CELL // patch)
    return *motion_scores(fields, rows=patches[0], columns=patches[1]), camera
