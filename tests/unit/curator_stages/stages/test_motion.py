"""Motion scores and camera tags, by optical flow and by the codec's vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from curator_stages.camera_motion import fit_camera
from curator_stages.config import CurationConfig
from curator_stages.decode import decode_span
from curator_stages.motion_fields import flow_fields, texture, turned
from curator_stages.stages.motion import MotionFilterStage, motion_scores
from curator_stages.tasks import Clip, ClipsTask, VideoSpan
from nemo_cosmos.contracts import ClipRecord, RawVideo
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture

FPS = 10.0
SIDE = 128


def clip_of(frames: np.ndarray, path: Path | None = None) -> ClipsTask:
    """A clip; with `path`, encoded and decoded so that it comes with the codec's motion."""
    motion = {}
    if path is not None:
        write_video(path, frames, fps=FPS, crf=20)
        whole = decode_span(
            path, start_frame=0, end_frame=None, fps=FPS, size=frames.shape[1:3], with_codec_motion=True
        )
        motion = {place: field for place, field in whole.codec_motion.items() if place > 0}
    record = ClipRecord(
        clip_id="a", source_video="a.mp4", source="s", rollout="a", split="train", start_frame=0,
        num_frames=len(frames), fps=FPS, height=frames.shape[1], width=frames.shape[2],
    )  # fmt: skip
    video = RawVideo(source="s", rollout="a", fps=FPS, num_frames=len(frames), split="train")
    span = VideoSpan(path="a.mp4", source_video="a.mp4", key="k", video=video, simulated=False)
    return ClipsTask(dataset_name="d", data=[Clip(record=record, frames=frames, codec_motion=motion)], span=span)


def filmed(path: Callable[[int], tuple[float, float, float]], num_frames: int = 16) -> np.ndarray:
    """A still scene seen by a camera whose view at frame t is shifted by x, y pixels and enlarged: `path(t)`."""
    rng = np.random.default_rng(3)
    scene = cv2.resize(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), (384, 384), interpolation=cv2.INTER_CUBIC)
    frames = []
    for t in range(num_frames):
        x, y, growth = path(t)
        view = np.array([[growth, 0, SIDE / 2 - growth * (192 + x)], [0, growth, SIDE / 2 - growth * (192 + y)]])
        frames.append(cv2.warpAffine(scene, view, (SIDE, SIDE), flags=cv2.INTER_LINEAR))
    return np.stack(frames)


SHAKE = np.random.default_rng(0).normal(0, 2, (16, 2))
PATHS = {
    "static": lambda t: (0, 0, 1),
    "pan_right": lambda t: (1.5 * t, 0, 1),
    "pan_left": lambda t: (-1.5 * t, 0, 1),
    "tilt_up": lambda t: (0, -1.5 * t, 1),
    "tilt_down": lambda t: (0, 1.5 * t, 1),
    "zoom_in": lambda t: (0, 0, 1.02**t),
    "zoom_out": lambda t: (0, 0, 1.3 * 0.98**t),
    "jitter": lambda t: (*SHAKE[t], 1),
}


@pytest.mark.parametrize("movement", PATHS)
@pytest.mark.parametrize("method", ["optical_flow", "motion_vectors"])
def test_camera_is_tagged(config: CurationConfig, tmp_path: Path, movement: str, method: str) -> None:
    task = clip_of(filmed(PATHS[movement]), tmp_path / "v.mp4")
    stage = MotionFilterStage(
        config=replace(config, motion_method=method, motion_min_global_mean=0.0, motion_min_per_patch=0.0)
    )
    (clip,) = stage.process(task).data
    assert clip.record.tags == (f"camera:{movement}", f"motion:{method}")


def test_camera_motion_has_the_right_size(config: CurationConfig) -> None:
    for path, name, value in (
        # 1.5 pixels of 128 + 128 per frame, ten frames per second.
        (PATHS["pan_right"], "camera_pan", 1.5 / 256 * FPS),
        (PATHS["tilt_up"], "camera_tilt", 1.5 / 256 * FPS),
        (PATHS["zoom_in"], "camera_zoom", 0.02 * FPS),
    ):
        (clip,) = MotionFilterStage(config=config).process(clip_of(filmed(path))).data
        assert clip.record.scores[name] == pytest.approx(value, rel=0.1)


def test_things_that_move_by_themselves_do_not_move_the_camera(config: CurationConfig) -> None:
    frames = filmed(PATHS["static"])
    moving = moving_texture(16, seed=5, height=64, width=64, speed=3)
    frames[:, :64, :64] = moving  # a quarter of the picture
    (clip,) = MotionFilterStage(config=config).process(clip_of(frames)).data
    assert "camera:static" in clip.record.tags and clip.record.scores["motion_global_mean"] > 1e-3


def test_similarity_is_fitted_exactly_where_cells_are_known() -> None:
    rows, columns = 9, 16
    y, x = np.mgrid[:rows, :columns]
    x, y = (x + 0.5 - columns / 2) / (rows + columns), (y + 0.5 - rows / 2) / (rows + columns)
    right, down, growth, roll = 0.003, -0.002, 0.01, 0.02
    field = np.stack([right + growth * x - roll * y, down + growth * y + roll * x], -1).astype(np.float32)
    field[2, 3] = np.nan
    field[:2, :4] += 0.05  # moves by itself
    fitted = fit_camera(field, np.ones((rows, columns)))
    np.testing.assert_allclose(fitted, [right, down, growth, roll], atol=2e-5)
    assert not fit_camera(np.full((4, 4, 2), np.nan), np.ones((4, 4))).any()


def test_a_turned_field_goes_with_its_picture() -> None:
    field = np.zeros((2, 3, 2))
    field[0, 2] = (1, 0)  # top right corner moves right
    np.testing.assert_array_equal(turned(field, 1)[0, 0], (0, -1))  # top left corner moves up
    np.testing.assert_array_equal(turned(field, 4), field)


def test_shaken_clips_are_rejected_where_asked_for(config: CurationConfig) -> None:
    for limit, kept in ((None, True), (1e-3, False)):
        stage = MotionFilterStage(config=replace(config, motion_max_jitter=limit))
        (clip,) = stage.process(clip_of(filmed(PATHS["jitter"]))).data
        assert clip.kept is kept
    assert clip.record.rejected_reason.startswith("shaken: camera_jitter")


def test_without_vectors_optical_flow_measures_and_says_so(config: CurationConfig) -> None:
    stage = MotionFilterStage(config=replace(config, motion_method="motion_vectors"))
    (clip,) = stage.process(clip_of(filmed(PATHS["pan_left"]))).data
    assert "motion:optical_flow" in clip.record.tags


def test_both_methods_measure_the_same(config: CurationConfig, tmp_path: Path) -> None:
    scores = {}
    for method in ("optical_flow", "motion_vectors"):
        stage = MotionFilterStage(config=replace(config, motion_method=method))
        (clip,) = stage.process(clip_of(filmed(PATHS["pan_left"]), tmp_path / "v.mp4")).data
        scores[method] = clip.record.scores["motion_global_mean"]
    assert scores["motion_vectors"] == pytest.approx(scores["optical_flow"], rel=0.1)


def test_motion_is_displacement_over_height_plus_width() -> None:
    frames = moving_texture(10, seed=1, height=128, width=128, speed=2)
    fields = list(flow_fields(frames, np.arange(0, 8, 2)).values())
    mean, least = motion_scores(fields, rows=2, columns=2)
    assert mean == pytest.approx(2 / 256, rel=0.15)
    assert least == pytest.approx(mean, rel=0.3)


def test_stillest_patch_is_seen() -> None:
    frames = moving_texture(10, seed=1, height=128, width=128)
    frames[:, :64, :64] = frames[0, :64, :64]
    mean, least = motion_scores(list(flow_fields(frames, np.arange(0, 8, 2)).values()), rows=2, columns=2)
    # Flow is smeared across the border of the still corner: its middle measures 0.01 of the moving part.
    assert least < 0.2 * mean


def test_texture_does_not_depend_on_where_arrays_lie() -> None:
    frame, between, seen = moving_texture(2, seed=21, height=96, width=96)[0], [], set()
    for size in np.random.default_rng(0).integers(1, 200_000, 60):
        between.append(np.empty(size, np.uint8))
        seen.add(texture(frame.copy()).tobytes())
    assert len(seen) == 1
