"""Video files with something wrong or unusual about them, by PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str = "mp4",
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    interlaced: bool = False,
) -> Path:
    """Encodes uint8 RGB frames at 10 per second, or shown at `times_ms`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        if interlaced:
            stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
        if times_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


def turn_clockwise(path: Path) -> Path:
    """Has players turn an mp4 by 90 degrees clockwise: the matrix of its track header."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes stand before the matrix
    one, unity = 0x10000, 0x40000000
    width = struct.unpack(">I", data[matrix + 36 : matrix + 40])[0]
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, width, 0, unity)
    path.write_bytes(data)
    return path


def claim_size(path: Path, height: int, width: int) -> Path:
    """Has an mp4's sample entry tell of another size than its pictures have."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
    data[entry : entry + 4] = struct.pack(">HH", width, height)
    path.write_bytes(data)
    return path
