"""Frames of untrusted files by their time: containers of pictures only, progressive, within limits of size and time."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import IO

import av
import numpy as np
from av.codec.context import Flags2
from av.video.frame import PictureType

from curator_stages.motion_fields import codec_field
from curator_stages.sources import is_address

MAX_PIXELS = 8192 * 4320
"""Pixels of a frame of 8K cinema: the largest frames that are decoded unless told otherwise."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,ivf,mxf"
"""Containers of pictures. Others are refused: a playlist that calls itself .mp4 would open whatever it names."""


MAX_FPS = 240.0
"""Frames per second of the slow motion of telephones: the highest rate that is decoded unless told otherwise."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""A header that tells of more than a week is taken to be wrong; spans are planned by it."""


class SourceLimitError(Exception):
    """A file that goes beyond what it is trusted with."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """How far a file is trusted."""

    max_pixels: int = MAX_PIXELS
    """Largest height x width; a frame takes 1.5 to 4 bytes per pixel, several times over for what decoders refer to."""
    timeout_s: float = 600.0
    """Longest time for decoding one span, and for opening the file before; twice that where one call hangs."""


@dataclass(frozen=True, kw_only=True)
class SourceFrame:
    """A frame and its place in time."""

    index: int
    """Of the grid of 1 / fps seconds that starts with the stream."""
    frame: av.VideoFrame
    quarter_turns: int
    """By which it is to be turned counter-clockwise to be upright."""
    deinterlaced: bool
    codec_motion: np.ndarray | None
    """As of `codec_field`; None where it was not asked for or the frame has no motion of its own."""


@contextlib.contextmanager
def opened(path: str, *, timeout_s: float) -> Iterator[av.container.InputContainer]:
    """Opens a path or an fsspec address; whatever FFmpeg would open besides is refused.

    Args:
        path: The path or address.
        timeout_s: Longest time for opening, as far as reads come back.

    Raises:
        TimeoutError: It took longer.
    """
    options = {"format_whitelist": _FORMATS}
    with contextlib.ExitStack() as stack:
        file: str | _TimedFile = path
        if is_address(path):
            import fsspec

            file = _TimedFile(stack.enter_context(fsspec.open(path, "rb")), timeout_s)
        try:
            container = stack.enter_context(av.open(file, "r", options=options, timeout=(timeout_s, None)))
        except av.ExitError as error:
            raise _late(timeout_s) from error
        if isinstance(file, _TimedFile):
            file.deadline = None
        yield container


class _TimedFile:
    """A file that is not read after a deadline: FFmpeg's own clock does not run while Python reads."""

    def __init__(self, file: IO[bytes], timeout_s: float) -> None:
        self._file, self._timeout_s = file, timeout_s
        self.deadline: float | None = time.monotonic() + timeout_s

    def read(self, size: int) -> bytes:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _late(self._timeout_s)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _late(timeout_s: float) -> TimeoutError:
    return TimeoutError(f"opening took longer than {timeout_s:g} s")


def source_frames(
    container: av.container.InputContainer,
    *,
    start_frame: int,
    fps: float,
    limits: DecodeLimits,
    with_codec_motion: bool = False,
) -> Iterator[SourceFrame]:
    """Decodes from the key frame before `start_frame` on, in the order of display.

    Args:
        container: An opened file with a video stream.
        start_frame: Index that the caller needs first.
        fps: Frames per second that indices count.
        limits: How far the file is trusted.
        with_codec_motion: Take over the motion vectors that the decoder meets.

    Yields:
        Frames; their indices may repeat or leave some out where the rate varies.

    Raises:
        av.FFmpegError: The file is damaged.
        SourceLimitError: It takes too long, or its frames are too large.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = _decoder_threads()
    if with_codec_motion:
        stream.codec_context.flags2 |= Flags2.export_mvs
    if start_frame > 0:
        offset = int(start_frame / fps / _time_base(stream)) + (stream.start_time or 0)
        container.seek(offset, stream=stream, backward=True)
    deinterlacer: _Deinterlacer | None = None
    last_index, last_reference = -1, None
    for frame in _decoded(container, stream, limits):
        index = _index_of(frame, stream, fps, last_index if start_frame == 0 else None)
        last_index = max(index, last_index)
        field = None
        if frame.pict_type != PictureType.B:
            if with_codec_motion and frame.pict_type == PictureType.P and last_reference is not None:
                field = codec_field(frame, max(1, index - last_reference))
            last_reference = index
        if frame.interlaced_frame and deinterlacer is None:
            deinterlacer = _Deinterlacer(stream)
        shown = SourceFrame(
            index=index,
            frame=frame,
            quarter_turns=round(frame.rotation / 90) % 4,
            deinterlaced=deinterlacer is not None,
            codec_motion=field,
        )
        if deinterlacer is None:
            yield shown
        else:
            yield from deinterlacer.push(shown)
    if deinterlacer is not None:
        yield from deinterlacer.flush()


def duration_s(container: av.container.InputContainer, *, timeout_s: float) -> float:
    """Returns how long the video stream lasts; packets are looked through only where no header tells.

    Raises:
        SourceLimitError: That takes too long.
    """
    stream = container.streams.video[0]
    if stream.duration:
        return float(stream.duration * _time_base(stream))
    if container.duration:
        return container.duration / av.time_base
    deadline, last = time.monotonic() + timeout_s, None
    for packet in container.demux(stream):
        if packet.pts is not None:
            last = packet.pts if last is None else max(last, packet.pts)
        if time.monotonic() > deadline:
            raise SourceLimitError(f"finding its length took longer than {timeout_s:g} s")
    if last is None:
        return 0.0
    return float((last - (stream.start_time or 0)) * _time_base(stream))


def _decoder_threads() -> int:
    """As many as OpenMP is given: one in workers that share the cores by tasks; 0 leaves it to FFmpeg."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else 0


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, limits: DecodeLimits
) -> Iterator[av.VideoFrame]:
    """Decodes packet by packet: the clock is looked at even while no picture comes out."""
    deadline = time.monotonic() + limits.timeout_s
    for packet in container.demux(stream):
        for frame in packet.decode():
            if frame.width * frame.height > limits.max_pixels:
                raise SourceLimitError(f"frames of {frame.width}x{frame.height} are over {limits.max_pixels:,} pixels")
            if frame.is_corrupt:
                raise av.InvalidDataError(0, "a damaged frame")
            yield frame
        if time.monotonic() > deadline:
            raise SourceLimitError(f"decoding took longer than {limits.timeout_s:g} s")


def _index_of(frame: av.VideoFrame, stream: av.VideoStream, fps: float, last_index: int | None) -> int:
    """Returns a frame's number from its time stamp; one without is the next, where counting started at the first."""
    if frame.pts is None:
        if last_index is None:
            raise av.InvalidDataError(0, "a frame without time stamp in a file too long to count frames")
        return last_index + 1
    return round(float((frame.pts - (stream.start_time or 0)) * _time_base(stream)) * fps)


def _time_base(stream: av.VideoStream) -> Fraction:
    """Returns the seconds that one tick of the stream's time stamps lasts."""
    if stream.time_base is None:
        raise av.InvalidDataError(0, "a video stream without time base")
    return stream.time_base


class _Deinterlacer:
    """FFmpeg's yadif, one frame out for each frame in."""

    def __init__(self, stream: av.VideoStream) -> None:
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(template=stream)
        yadif = self._graph.add("yadif", "mode=send_frame:deint=interlaced")
        source.link_to(yadif)
        yadif.link_to(self._graph.add("buffersink"))
        self._graph.configure()
        self._waiting: deque[SourceFrame] = deque()

    def push(self, frame: SourceFrame) -> Iterator[SourceFrame]:
        """Takes a frame and gives those that are done; yadif looks one frame ahead."""
        self._waiting.append(frame)
        self._graph.push(frame.frame)
        yield from self._done()

    def flush(self) -> Iterator[SourceFrame]:
        """Gives what is left."""
        self._graph.push(None)
        yield from self._done()

    def _done(self) -> Iterator[SourceFrame]:
        while self._waiting:
            try:
                picture = self._graph.pull()
            except (BlockingIOError, EOFError):
                return
            assert isinstance(picture, av.VideoFrame)
            yield replace(self._waiting.popleft(), frame=picture)
