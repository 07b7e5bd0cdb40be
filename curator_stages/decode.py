"""Looking into source videos: what a file holds, and the frames of one span, decoded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from nemo_cosmos.video_io import resize_frames


class UnusableVideoError(Exception):
    """A source video that no clip can be had from; the message is the reason in the manifest."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the container says of a video."""

    fps: float
    num_frames: int
    """Estimated from the duration; 0 when the file holds no packet."""


@dataclass(frozen=True, kw_only=True)
class DecodedSpan:
    """Frames of a span at the stored size."""

    frames: list[np.ndarray]
    """uint8 RGB [H, W, 3] each."""
    source_height: int
    source_width: int
    error: str | None
    """Why decoding stopped before the span's end, or None."""


def probe(path: str | Path) -> VideoInfo:
    """Reads frame rate and length without decoding.

    Raises:
        UnusableVideoError: The file is empty, corrupt or holds no pictures.
    """
    if Path(path).stat().st_size == 0:
        raise UnusableVideoError("the file is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnusableVideoError("no video stream, only sound or data")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            if fps <= 0:
                raise UnusableVideoError("the frame rate cannot be told")
            return VideoInfo(fps=fps, num_frames=round(_duration_s(container, stream) * fps))
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise UnusableVideoError(f"cannot be opened as a video ({_said(error)})") from error


def decode_span(
    path: str | Path, *, start_frame: int, end_frame: int | None, fps: float, size: tuple[int, int]
) -> DecodedSpan:
    """Decodes frames [start_frame, end_frame), upright, scaled and cropped to `size` (height, width).

    A file that is damaged on the way gives the frames before the damage and `error`.
    """
    frames: list[np.ndarray] = []
    source_height = source_width = 0
    error = None
    try:
        for picture in _pictures(path, start_frame, end_frame, fps):
            source_height, source_width = picture.shape[:2]
            frames.append(resize_frames(picture[None], *size)[0])
    except av.FFmpegError as problem:
        error = f"cannot be decoded after frame {start_frame + len(frames)} ({_said(problem)})"
    return DecodedSpan(frames=frames, source_height=source_height, source_width=source_width, error=error)


def _pictures(path: str | Path, start_frame: int, end_frame: int | None, fps: float) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if start_frame > 0:
            offset = int(start_frame / fps / _time_base(stream)) + (stream.start_time or 0)
            container.seek(offset, stream=stream, backward=True)
        index = -1
        for frame in container.decode(stream):
            index = _index_of(frame, stream, fps) if start_frame > 0 else index + 1
            if end_frame is not None and index >= end_frame:
                return
            if index >= start_frame:
                yield np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def _index_of(frame: av.VideoFrame, stream: av.VideoStream, fps: float) -> int:
    """Returns a frame's number from its time stamp: after a seek there is nothing to count from."""
    if frame.pts is None:
        raise av.InvalidDataError(0, "a frame without time stamp in a file too long to count frames")
    return round(float((frame.pts - (stream.start_time or 0)) * _time_base(stream)) * fps)


def _time_base(stream: av.VideoStream) -> Fraction:
    """Returns the seconds that one tick of the stream's time stamps lasts."""
    if stream.time_base is None:
        raise av.InvalidDataError(0, "a video stream without time base")
    return stream.time_base


def _said(error: Exception) -> str:
    """Returns FFmpeg's words without the path, which differs from machine to machine."""
    return getattr(error, "strerror", None) or str(error)


def _duration_s(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    if stream.duration:
        return float(stream.duration * _time_base(stream))
    if container.duration:
        return container.duration / av.time_base
    last = max((packet.pts for packet in container.demux(stream) if packet.pts is not None), default=None)
    if last is None:
        return 0.0
    return float((last - (stream.start_time or 0)) * _time_base(stream))
