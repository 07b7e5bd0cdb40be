from __future__ import annotations

import errno
import itertools
import types
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from curator_stages import decode, source_frames
from curator_stages.decode import decode_span, probe
from curator_stages.source_frames import SourceFrame
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture


def numbered(num_frames: int) -> np.ndarray:
    """Frames whose grey value tells their number."""
    values = (np.arange(num_frames) * 3).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (num_frames, 32, 32, 3)).copy()


def numbers(frames: list[np.ndarray]) -> list[int]:
    return [round(float(f.mean()) / 3) for f in frames]


@pytest.mark.parametrize(("start", "end"), [(0, 10), (17, 40), (60, None)])
def test_a_span_holds_exactly_its_frames(tmp_path: Path, start: int, end: int | None) -> None:
    path = write_video(tmp_path / "v.mp4", numbered(80), fps=29.97)
    info = probe(path)
    assert info.num_frames == 80
    decoded = decode_span(path, start_frame=start, end_frame=end, fps=info.fps, size=(32, 32))
    assert numbers(decoded.frames) == list(range(start, end or 80))
    assert decoded.error is None


def test_frames_come_at_the_stored_size_and_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", moving_texture(4, seed=1, height=64, width=96), fps=10)
    decoded = decode_span(path, start_frame=0, end_frame=None, fps=10.0, size=(48, 48))
    assert decoded.frames[0].shape == (48, 48, 3)
    assert (decoded.source_height, decoded.source_width) == (64, 96)


@pytest.mark.parametrize(
    ("problem", "may_pass"),
    [(av.InvalidDataError(0, "bad packet"), False), (OSError(errno.EIO, "bad packet"), True)],
    ids=["file", "reading"],
)
def test_damage_gives_the_frames_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, may_pass: bool
) -> None:
    path = write_video(tmp_path / "v.mp4", numbered(20), fps=10)
    whole = decode.source_frames

    def damaged(*args: object, **options: object) -> Iterator[SourceFrame]:
        yield from itertools.takewhile(lambda f: f.index < 13, whole(*args, **options))
        raise problem

    monkeypatch.setattr(decode, "source_frames", damaged)
    decoded = decode_span(path, start_frame=5, end_frame=None, fps=10.0, size=(32, 32))
    assert numbers(decoded.frames) == list(range(5, 13))
    assert decoded.error == "cannot be decoded after frame 13 (bad packet)"
    assert decoded.failed == may_pass


def test_a_stream_that_does_not_time_its_frames_is_told() -> None:
    with pytest.raises(av.InvalidDataError, match="without time base"):
        source_frames._time_base(types.SimpleNamespace(time_base=None))
