"""Preview: a small moving picture of each clip, to look through a set quickly."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.faults import failing_alone
from curator_stages.tasks import ClipsTask
from nemo_cosmos.video_io import resize_frames


@dataclass
class PreviewStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives clips an animated webp; names and values are those of NeMo-Curator's `PreviewStage`.

    Clips of fewer frames per second or a smaller height than asked for keep their own.
    """

    target_fps: float = 1.0
    """Pictures per second of video, shown as fast."""
    target_height: int = 240
    """Pixels; the width follows."""
    compression_level: int = 6
    """Work spent on a smaller file, 0 to 6."""
    quality: int = 50
    """0 to 100."""
    name: str = "preview"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with `preview`."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Makes previews of the kept clips of one span."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                clip.preview = self._animation(clip.pixels, clip.record.fps)
        return task

    def _animation(self, frames: np.ndarray, fps: float) -> bytes:
        """uint8 [T, H, W, 3] -> webp file."""
        shown_fps = min(self.target_fps, fps)
        count = max(1, int(len(frames) * shown_fps / fps + 1e-6))
        places = (np.arange(count) * fps / shown_fps).astype(int)
        height = min(self.target_height, frames.shape[1])
        width = max(1, round(frames.shape[2] * height / frames.shape[1]))
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="webp", options={"loop": "0"}) as container:
            stream = container.add_stream("libwebp_anim", rate=Fraction(shown_fps).limit_denominator(1001))
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"compression_level": str(self.compression_level), "quality": str(self.quality)}
            for picture in resize_frames(frames[places], height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return buffer.getvalue()
