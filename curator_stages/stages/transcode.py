"""Transcode: encodes clips as H.264 and cuts what the sidecar says down to each of them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.conditions import cover_crop_intrinsics, slice_conditions
from curator_stages.config import CurationConfig
from curator_stages.tasks import Clip, ClipsTask
from nemo_cosmos.contracts import Conditions


@dataclass
class TranscodeStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives each clip its mp4 (libx264, yuv420p, short groups of pictures) and its conditions."""

    config: CurationConfig
    name: str = "transcode"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with mp4."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Encodes the kept clips of one span."""
        for clip in task.kept():
            config = self.config
            clip.mp4 = encode_h264(
                clip.pixels, fps=clip.record.fps, crf=config.crf, gop=config.gop, preset=config.x264_preset
            )
            clip.record = replace(clip.record, conditions=self._conditions(clip, task.span.video.conditions))
        return task

    def _conditions(self, clip: Clip, whole: Conditions) -> Conditions:
        record = clip.record
        cut = slice_conditions(whole, record.start_frame, record.num_frames)
        if cut.intrinsics is None:
            return cut
        old = (int(record.scores["source_height"]), int(record.scores["source_width"]))
        return replace(cut, intrinsics=cover_crop_intrinsics(cut.intrinsics, old, (record.height, record.width)))


def encode_h264(frames: np.ndarray, *, fps: float, crf: int, gop: int, preset: str = "veryfast") -> bytes:
    """Encodes frames in memory; the same frames give the same bytes on every machine.

    Args:
        frames: uint8 RGB [T, H, W, 3]; H and W even.
        fps: Frames per second.
        crf: x264 constant rate factor.
        gop: Most frames between key frames.
        preset: x264's.

    Returns:
        An mp4 file.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # x264's choices depend on the number of threads, and with its macroblock tree they vary from run to run.
        stream.options = {"crf": str(crf), "g": str(gop), "preset": preset, "threads": "1", "mbtree": "0"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_numpy_buffer(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
