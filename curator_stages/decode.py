"""Looking into source videos: what a file holds, and the frames of one span, decoded once and within limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np

from curator_stages.motion_fields import turned
from curator_stages.scaling import Scaler, upright_size
from curator_stages.source_frames import (
    MAX_DURATION_S,
    MAX_FPS,
    MAX_PIXELS,
    DecodeLimits,
    SourceFrame,
    SourceLimitError,
    duration_s,
    opened,
    source_frames,
)
from curator_stages.sources import said_by
from curator_stages.time_limit import within

SAMPLE_SIDE = 960
"""Longer side in pixels of the largest sample pictures."""


SizeChoice = Callable[[int, int], tuple[int, int]]
"""Tells the height and width to store from those of an upright source."""


class UnusableVideoError(Exception):
    """A source video that no clip can be had from; the message is the reason in the manifest."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the container says of a video."""

    fps: float
    num_frames: int
    """Estimated from the duration; 0 when the file holds no packet."""


@dataclass(kw_only=True)
class DecodedSpan:
    """Frames of a span at the stored size, evenly spaced in time; the arrays of a dict go by place among `frames`."""

    frames: list[np.ndarray] = field(default_factory=list)
    """uint8 RGB [H, W, 3] each."""
    source_height: int = 0
    source_width: int = 0
    error: str | None = None
    """Why decoding stopped before the span's end, or None."""
    failed: bool = False
    """Whether that was reading the file, which may go well another time, rather than what is in it."""
    deinterlaced: bool = False
    num_uneven: int = 0
    """Frames that were repeated or left out, since the source's rate varies."""
    samples: dict[int, np.ndarray] = field(default_factory=dict)
    """uint8 RGB pictures of the whole source frame, scaled to `SAMPLE_SIDE` where larger."""
    codec_motion: dict[int, np.ndarray] = field(default_factory=dict)
    """Fields as of `motion_fields.codec_field`."""


def probe(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, max_fps: float = MAX_FPS, timeout_s: float = 600.0
) -> VideoInfo:
    """Reads frame rate and length without decoding.

    Args:
        path: A path, or an address that fsspec knows.
        max_pixels: Largest height x width that will do.
        max_fps: Most frames per second that will do.
        timeout_s: Longest time for opening the file, and for looking through one whose header tells no length; twice
            that for one read or the like that does not come back.

    Raises:
        UnusableVideoError: The file is empty, corrupt, over a limit or holds no pictures.
    """
    try:
        return within(2 * timeout_s, lambda: _probed(str(path), max_pixels, max_fps, timeout_s))
    except SourceLimitError as error:
        raise UnusableVideoError(str(error)) from error
    except (av.FFmpegError, UnicodeDecodeError, OSError) as error:
        raise UnusableVideoError(f"cannot be opened as a video ({said_by(error)})") from error


def _probed(path: str, max_pixels: int, max_fps: float, timeout_s: float) -> VideoInfo:
    with opened(path, timeout_s=timeout_s) as container:
        if not container.streams.video:
            raise UnusableVideoError("no video stream, only sound or data")
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise UnusableVideoError(f"frames of {stream.width}x{stream.height} are over {max_pixels:,} pixels")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            raise UnusableVideoError("the frame rate cannot be told")
        if fps > max_fps:
            raise UnusableVideoError(f"{fps:g} frames per second are over {max_fps:g}")
        length_s = duration_s(container, timeout_s=timeout_s)
        if length_s > MAX_DURATION_S:
            raise UnusableVideoError(f"its header tells of {length_s / 3600:,.0f} hours")
        return VideoInfo(fps=fps, num_frames=round(length_s * fps))


def decode_span(
    path: str | Path,
    *,
    start_frame: int,
    end_frame: int | None,
    fps: float,
    size: tuple[int, int] | SizeChoice,
    most_frames: int | None = None,
    limits: DecodeLimits | None = None,
    sample_every: int | None = None,
    with_codec_motion: bool = False,
) -> DecodedSpan:
    """Decodes frames [start_frame, end_frame), upright, progressive, scaled and cropped to a size.

    Frames are taken by their time stamps, one per 1 / fps seconds: where a source of variable frame rate has none for
    that time, the last one is repeated; where it has several, the last is taken.

    Args:
        path: A path, or an address that fsspec knows.
        start_frame: First frame.
        end_frame: One past the last one; None reads to the end of the file.
        fps: Frames per second of the result.
        size: Height and width in pixels, or what tells them of the span's first frame.
        most_frames: A file that holds more than this, where there is no `end_frame`, is wrong.
        limits: How far the file is trusted.
        sample_every: Frames from one of `DecodedSpan.samples` to the next; None takes none.
        with_codec_motion: Take over the motion vectors that the decoder meets.

    Returns:
        The frames. A file that is damaged, or over its limits, gives those before that and `error`.
    """
    choice = size if callable(size) else lambda *_: size
    limits = limits or DecodeLimits()
    taker = _Taker(start_frame, end_frame, choice, most_frames, sample_every)

    def decode() -> None:
        with opened(str(path), timeout_s=limits.timeout_s) as container:
            for frame in source_frames(
                container,
                start_frame=start_frame,
                fps=fps,
                limits=limits,
                with_codec_motion=with_codec_motion,
            ):
                if not taker.take(frame):
                    break

    try:
        # The clocks inside are for opening and for decoding, and stand still while one call does not return.
        within(2 * limits.timeout_s, decode)
    except (av.FFmpegError, SourceLimitError, OSError) as problem:
        span = taker.so_far()
        span.error = f"cannot be decoded after frame {start_frame + len(span.frames)} ({said_by(problem)})"
        span.failed = isinstance(problem, OSError)
        return span
    return taker.span


class _Taker:
    """Puts frames in their places."""

    def __init__(
        self, start: int, end: int | None, choice: SizeChoice, most: int | None, sample_every: int | None
    ) -> None:
        self.span = DecodedSpan()
        self._start, self._end, self._most, self._sample_every = start, end, most, sample_every
        self._choice, self._stored, self._whole = choice, Scaler(None), Scaler(None)
        self._before: SourceFrame | None = None
        self._shown: SourceFrame | None = None

    def so_far(self) -> DecodedSpan:
        """Returns what was taken, which a decoder that comes back late does not add to."""
        span = self.span
        return replace(span, frames=list(span.frames), samples=dict(span.samples), codec_motion=dict(span.codec_motion))

    def take(self, frame: SourceFrame) -> bool:
        """Takes a frame; says whether the span wants more."""
        span = self.span
        if frame.index < self._start:
            self._before = frame
            return True
        place = frame.index - self._start
        if self._end is None and self._most is not None and place >= self._most:
            raise SourceLimitError(f"it goes on after {self._most} frames, which its header does not tell of")
        missing = (place if self._end is None else min(place, self._end - self._start)) - len(span.frames)
        if missing > 0 and not span.frames and self._before is not None:
            self._append(self._before)
            missing -= 1
        if missing > 0 and span.frames:
            self._repeat(missing)
        if self._end is not None and frame.index >= self._end:
            return False
        if place < len(span.frames):
            span.num_uneven += 1
            if place < len(span.frames) - 1:
                return True  # time stamps that go backwards
            span.frames.pop()
        self._append(frame)
        return True

    def _append(self, frame: SourceFrame) -> None:
        span, place = self.span, len(self.span.frames)
        span.source_height, span.source_width = upright_size(frame)
        if place == 0:
            self._stored = Scaler(self._choice(span.source_height, span.source_width))
        span.deinterlaced |= frame.deinterlaced
        span.frames.append(np.ascontiguousarray(self._stored.picture(frame)))
        if self._is_sampled(place):
            span.samples[place] = self._sample_of(frame)
        if frame.codec_motion is not None:
            span.codec_motion[place] = turned(frame.codec_motion, frame.quarter_turns)
        self._shown = frame

    def _repeat(self, count: int) -> None:
        """Shows the last frame `count` times more, in the samples too: a short clip may have no other one."""
        span, place = self.span, len(self.span.frames)
        span.frames += [span.frames[-1]] * count
        span.num_uneven += count
        if sampled := [repeated for repeated in range(place, place + count) if self._is_sampled(repeated)]:
            assert self._shown is not None
            span.samples |= dict.fromkeys(sampled, self._sample_of(self._shown))

    def _is_sampled(self, place: int) -> bool:
        return self._sample_every is not None and (self._start + place) % self._sample_every == 0

    def _sample_of(self, frame: SourceFrame) -> np.ndarray:
        return _within(self._whole.picture(frame), SAMPLE_SIDE)


def _within(picture: np.ndarray, side: int) -> np.ndarray:
    import cv2

    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(picture)
    width, height = (max(1, round(length * scale)) for length in (picture.shape[1], picture.shape[0]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
