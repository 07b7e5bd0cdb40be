"""What H.264 and H.265 make of the same frames: real encodes, real file sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from nemo_cosmos.contracts import Record
from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.metrics import psnr
from nemo_cosmos.video_io import stream_video

CRFS = (8, 16, 24, 32, 40, 48)
"""Constant rate factors that are measured, from nearly lossless to coarse."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A video codec and the encoder that stands for it."""

    name: str
    encoder: str
    """FFmpeg's name."""
    container: str
    """FFmpeg's name of the codec's raw stream, which spends nothing on a container."""
    options: tuple[tuple[str, str], ...] = ()

    @property
    def is_available(self) -> bool:
        """Whether this build of PyAV has the encoder."""
        return self.encoder in av.codecs_available


CODECS = (
    Codec(name="H.264", encoder="libx264", container="h264"),
    Codec(name="H.265", encoder="libx265", container="hevc", options=(("x265-params", "log-level=error:info=0"),)),
)
"""Both at their encoder's own preset (medium), 4:2:0."""


@dataclass(frozen=True, kw_only=True)
class RatePoint(Record):
    """One trade between size and truth."""

    bits_per_pixel: float
    """Bits of the whole file by the pixels of all frames."""
    psnr_db: float
    """Mean over the frames."""


def encode_with(codec: Codec, frames: Callable[[], Iterable[np.ndarray]], *, crf: int, fps: float) -> RatePoint:
    """Encodes a video, decodes the file and compares; one frame of it is in memory at a time, beside the codec's own.

    Args:
        codec: Which.
        frames: Reads the video from its start, uint8 [H, W, 3] frame by frame; called twice. Odd sizes are padded to
            even ones by repeating the last row and column, and the padding is not compared.
        crf: Constant rate factor.
        fps: Frames per second.

    Raises:
        UserError: The encoder refuses the video, or the codec is not there.
    """
    with tempfile.TemporaryDirectory(prefix="codec_") as folder:
        path = Path(folder) / f"video.{codec.container}"
        try:
            _encode(codec, frames(), path, crf=crf, fps=fps)
        except av.FFmpegError as error:
            raise user_error(
                codec.name, error.strerror, "a video that it can encode", "Leave the video out."
            ) from error
        values, pixels = [], 0
        for truth, decoded in zip(frames(), stream_video(path), strict=True):
            height, width = truth.shape[:2]
            values.append(psnr(truth[None], decoded[None, :height, :width])[0])
            pixels += height * width
        return RatePoint(bits_per_pixel=8 * path.stat().st_size / pixels, psnr_db=float(np.mean(values)))


def mean_curve(curves: Iterable[tuple[RatePoint, ...]]) -> tuple[RatePoint, ...]:
    """Averages the curves of several videos, point by point."""
    return tuple(
        RatePoint(
            bits_per_pixel=float(np.mean([point.bits_per_pixel for point in points])),
            psnr_db=float(np.mean([point.psnr_db for point in points])),
        )
        for points in zip(*curves, strict=True)
    )


def psnr_at(curve: tuple[RatePoint, ...], bits_per_pixel: float) -> float | None:
    """PSNR of a codec at a rate, linear in the logarithm of the rate between measured points.

    Returns:
        dB; None outside the measured rates.
    """
    points = sorted((point.bits_per_pixel, point.psnr_db) for point in curve)
    rates, values = np.array(points).T
    if not rates[0] <= bits_per_pixel <= rates[-1]:
        return None
    return float(np.interp(np.log(bits_per_pixel), np.log(rates), values))


def _encode(codec: Codec, frames: Iterable[np.ndarray], path: Path, *, crf: int, fps: float) -> None:
    with av.open(str(path), "w", format=codec.container) as container:
        stream = container.add_stream(codec.encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), **dict(codec.options)}
        for number, picture in enumerate(_even(frames)):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _even(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pads pictures to even sizes by their last row and column."""
    for frame in frames:
        height, width = frame.shape[:2]
        yield np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
