"""Transcode: encodes clips as H.264 and cuts what the sidecar says down to each of them."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.conditions import cover_crop_intrinsics, slice_conditions
from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import with_gpus
from curator_stages.tasks import Clip, ClipsTask
from nemo_cosmos.contracts import Conditions
from nemo_cosmos.errors import user_error

X264, NVENC = "libx264", "h264_nvenc"
_STREAMS_PER_GPU = 3
"""Workers that share a GPU's encoders, as in NeMo-Curator."""
_log = logging.getLogger(__name__)


@dataclass
class TranscodeStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives each clip its mp4 (H.264, yuv420p, short groups of pictures) and its conditions."""

    config: CurationConfig
    name: str = "transcode"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where NVENC is to encode."""
        self.resources = with_gpus(self.resources, encoder_gpus(self.config))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with mp4."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Chooses the encoder.

        Raises:
            UserError: NVENC is asked for, and is not there.
        """
        self._codec = choose_encoder(self.config.encoder)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Encodes the kept clips of one span."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                config = self.config
                clip.mp4 = encode_h264(
                    clip.pixels,
                    fps=clip.record.fps,
                    crf=config.crf,
                    gop=config.gop,
                    codec=self._codec,
                    preset=config.x264_preset,
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


def choose_encoder(name: str) -> str:
    """Returns the codec to encode with.

    Args:
        name: `libx264`, `h264_nvenc`, or `auto` for NVENC where it is there.

    Raises:
        UserError: NVENC is asked for, and is not there.
    """
    if name == X264:
        return X264
    try:
        encode_h264(np.zeros((1, 256, 256, 3), np.uint8), fps=1.0, crf=16, gop=1, codec=NVENC)
    except (av.FFmpegError, ValueError) as error:  # the latter where FFmpeg was built without it
        if name == NVENC:
            raise user_error(
                "encoder", NVENC, "a GPU with NVENC and its driver", f"Here it fails ({error}); choose {X264} or auto."
            ) from error
        _log.warning("NVENC cannot be used here (%s): clips are encoded by %s.", error, X264)
        return X264
    return NVENC


def encoder_gpus(config: CurationConfig) -> float:
    """GPUs that a transcoding worker asks for: a share where it is to use NVENC, with `auto` where `device` is one."""
    wanted = config.encoder == NVENC or (config.encoder == "auto" and config.device != "cpu")
    return round(1 / _STREAMS_PER_GPU, 2) if wanted else 0.0


def encode_h264(
    frames: np.ndarray, *, fps: float, crf: int, gop: int, codec: str = X264, preset: str = "veryfast"
) -> bytes:
    """Encodes frames in memory; with libx264 the same frames give the same bytes on every machine.

    Args:
        frames: uint8 RGB [T, H, W, 3]; H and W even.
        fps: Frames per second.
        crf: x264 constant rate factor, or NVENC's `cq`.
        gop: Most frames between key frames.
        codec: `libx264` or `h264_nvenc`.
        preset: x264's.

    Returns:
        An mp4 file.

    Raises:
        av.FFmpegError: The codec cannot be used here.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = _options(codec, crf, gop, preset)
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_numpy_buffer(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _options(codec: str, crf: int, gop: int, preset: str) -> dict[str, object]:
    if codec == NVENC:
        return {"rc": "vbr", "cq": str(crf), "b": "0", "g": str(gop), "preset": "p4", "tune": "hq"}
    # x264's choices depend on the number of threads, and with its macroblock tree they vary from run to run.
    return {"crf": str(crf), "g": str(gop), "preset": preset, "threads": "1", "mbtree": "0"}
