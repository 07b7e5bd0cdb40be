"""Reading and writing video files with PyAV: uint8 frames outside, float [-1, 1] inside models."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import written_aside

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.video.stream import VideoStream

_MEND_VIDEO = "The file is corrupt, empty or no video: fetch or write it again, or remove it."


VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def read_video(
    source: str | Path | bytes, *, name: str | None = None, first_frame: int = 0, max_frames: int | None = None
) -> tuple[np.ndarray, float]:
    """Decodes a video.

    Args:
        source: Path of an mp4 or anything else that FFmpeg reads, or such a file's bytes.
        name: What errors call it; the path when there is one.
        first_frame: Begin with this one. Of those before, only what follows the last key frame is decoded, where the
            file tells when each frame is shown.
        max_frames: Stop after this many.

    Returns:
        Frames, uint8 RGB [T, H, W, 3], and frames per second.

    Raises:
        UserError: The file is missing, corrupt, or holds no picture.
    """
    name = name or ("video" if isinstance(source, bytes) else str(source))
    times = _times(source, name) if first_frame else None
    with _opened(source, name) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        decoded: Iterator[av.VideoFrame]
        if times is None:
            decoded = itertools.islice(container.decode(stream), first_frame, None)
        else:
            decoded = _decoded_from(container, stream, times, first_frame)
        frames = [frame.to_ndarray(format="rgb24") for frame in itertools.islice(decoded, max_frames)]
    if not frames or fps <= 0:
        got = f"{len(frames)} frames at {fps:g} per second"
        raise user_error(name, got, "at least one, at a known rate", _MEND_VIDEO)
    return np.stack(frames), fps


def stream_video(path: str | Path, *, max_frames: int | None = None) -> Iterator[np.ndarray]:
    """Decodes a video frame by frame, so that it need not fit into memory.

    Args:
        path: An mp4 or anything else that FFmpeg reads.
        max_frames: Stop after this many.

    Yields:
        uint8 RGB [H, W, 3].

    Raises:
        UserError: The file is missing, holds no picture, or is corrupt, which may show only after some frames.
    """
    empty = True
    with _opened(path, str(path)) as (container, stream):
        for frame in itertools.islice(container.decode(stream), max_frames):
            empty = False
            yield frame.to_ndarray(format="rgb24")
    if empty:
        raise user_error(str(path), "0 frames", "at least one", _MEND_VIDEO)


def probe_video(path: str | Path) -> tuple[int, float]:
    """Counts the frames that a video says it has, without decoding them, and reads the rate.

    Returns:
        Number of frames and frames per second.

    Raises:
        UserError: The file is missing, corrupt, or holds no picture.
    """
    with _opened(path, str(path)) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not num_frames or fps <= 0:
        got = f"{num_frames} frames at {fps:g} per second"
        raise user_error(str(path), got, "at least one, at a known rate", _MEND_VIDEO)
    return num_frames, fps


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file's first video stream; what FFmpeg objects to in the block becomes a `UserError`."""
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise UserError(f"{name}: no such video file. Check the path.")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            if not container.streams.video:
                raise UserError(f"{name}: holds no video stream. Give a file with pictures in it.")
            container.streams.video[0].thread_type = "AUTO"
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise user_error(name, error.strerror, "a video that can be decoded", _MEND_VIDEO) from error


def _times(source: str | Path | bytes, name: str) -> list[int] | None:
    """When each frame is shown, in order, without decoding any; None where the file does not tell it of every one."""
    with _opened(source, name) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    known = [time for time in times if time is not None]
    return sorted(known) if len(set(known)) == len(times) else None


def _decoded_from(
    container: InputContainer, stream: VideoStream, times: list[int], first_frame: int
) -> Iterator[av.VideoFrame]:
    """Frames from `first_frame` on."""
    if first_frame >= len(times):
        return iter(())
    start = times[first_frame]
    return itertools.dropwhile(lambda f: _shown_at(f) < start, _from_key_frame(container, stream, times[0], start))


def _from_key_frame(container: InputContainer, stream: VideoStream, begin: int, start: int) -> Iterator[av.VideoFrame]:
    """Frames from the last key frame on that is shown at `start` or before; of a file that begins at `begin`."""
    for time in (start, begin):
        container.seek(time, stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        # Files are searched by when a frame is decoded, which is before it is shown.
        if first is not None and _shown_at(first) <= start:
            break
    return itertools.chain([] if first is None else [first], frames)


def _shown_at(frame: av.VideoFrame) -> int:
    assert frame.pts is not None  # of a file that tells it of every packet
    return frame.pts


def write_video(path: str | Path, frames: np.ndarray, *, fps: float, crf: int = 16) -> Path:
    """Encodes frames as H.264 (yuv420p) in mp4, aside and renamed.

    Args:
        path: Where to write.
        frames: uint8 RGB [T, H, W, 3]; H and W even.
        fps: Frames per second.
        crf: x264 constant rate factor; 16 is visually lossless.

    Returns:
        The path written.

    Raises:
        UserError: The frames' shape or dtype is wrong, or the disk is full.
    """
    path = Path(path)
    if (
        frames.dtype != np.uint8
        or frames.ndim != 4
        or frames.size == 0
        or frames.shape[-1] != 3
        or frames.shape[1] % 2
        or frames.shape[2] % 2
    ):
        raise UserError(
            f"frames: got {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3], T >= 1, with even H and W. "
            "Convert or pad them."
        )
    with written_aside(path) as aside, av.open(str(aside), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames to cover height x width (area filter) and crops the centre.

    Args:
        frames: uint8 [T, H, W, 3].
        height: Wanted height in pixels.
        width: Wanted width in pixels.

    Returns:
        uint8 [T, height, width, 3].
    """
    import cv2

    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    scale = max(height / old_height, width / old_width)
    size = (max(width, round(old_width * scale)), max(height, round(old_height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    scaled = np.empty((len(frames), height, width, 3), np.uint8)
    for i, picture in enumerate(frames):
        scaled[i] = cv2.resize(picture, size, interpolation=method)[top : top + height, left : left + width]
    return scaled


def to_model(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """Float [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], clamped and rounded."""
    import torch

    scaled = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous().numpy()


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture as uint8 RGB [H, W, 3].

    Raises:
        UserError: The file is missing or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}). Give a png or jpg file.") from error
