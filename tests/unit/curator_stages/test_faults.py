"""Files with something wrong about them, through the decoder and through the whole pipeline."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from av.container import InputContainer

from curator_stages import decode as decoding
from curator_stages import source_frames
from curator_stages.config import CurationConfig
from curator_stages.decode import DecodedSpan, UnusableVideoError, decode_span, probe
from curator_stages.executor import InProcessExecutor
from curator_stages.faults import failing_alone
from curator_stages.pipeline import curate
from curator_stages.source_frames import DecodeLimits, SourceFrame
from curator_stages.stages import quality
from curator_stages.stages.reader import plan_spans
from curator_stages.stages.shot_split import ShotSplitStage
from curator_stages.tasks import Clip, SpanTask, VideoSpan, empty_clip
from nemo_cosmos.contracts import RawVideo
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages import faulty_files
from tests.unit.curator_stages.samples import moving_texture


def decode(path: Path, *, size: tuple[int, int] = (64, 96), **options: object) -> DecodedSpan:
    fps = probe(path).fps
    return decode_span(path, start_frame=0, end_frame=None, fps=fps, size=size, **options)


def split(folder: Path, config: CurationConfig) -> list[Clip]:
    """The clips of the one video in a folder."""
    stage = ShotSplitStage(config=config)
    stage.setup()
    spans = plan_spans(folder, None, config)
    return [clip for span in spans for clip in stage.process(SpanTask(dataset_name="d", data=span)).data]


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return moving_texture(20, seed=1, height=64, width=96)


def test_files_without_pictures_say_why(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    faulty_files.write_sound(tmp_path / "sound.mp4")
    for name, reason in (
        ("noise", r"cannot be opened as a video \([^/]*\)$"),
        ("text", r"cannot be opened as a video \([^/]*\)$"),
        ("sound", "no video stream"),
    ):
        with pytest.raises(UnusableVideoError, match=reason):
            probe(tmp_path / f"{name}.mp4")


def test_a_playlist_that_calls_itself_a_video_opens_nothing(tmp_path: Path, frames: np.ndarray) -> None:
    write_video(tmp_path / "secret.mp4", frames, fps=10)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    with pytest.raises(UnusableVideoError, match="cannot be opened"):
        probe(tmp_path / "list.mp4")


def test_a_wrong_extension_is_no_harm(tmp_path: Path, frames: np.ndarray) -> None:
    path = faulty_files.write(tmp_path / "v.mp4", frames, container="matroska")
    assert len(decode(path).frames) == 20


def test_truncated_file_gives_what_is_whole_and_says_where_it_ends(tmp_path: Path, config: CurationConfig) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8)
    path = faulty_files.write(
        tmp_path / "v.mkv", noise, container="matroska", options={"g": "5", "bf": "0", "crf": "4"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    decoded = decode(path)
    assert 15 <= len(decoded.frames) <= 21
    for shown, encoded in zip(decoded.frames[:15], noise, strict=False):
        assert apart(shown, encoded) < 60  # colour is halved; two frames of noise are 85 apart
    fixed = replace(config, shot_detector="fixed_stride", max_s=1.0, span_s=1.0)
    *_, last = split(tmp_path, fixed)
    assert last.record.rejected_by == "shot_split" and last.record.num_frames == 0
    assert last.record.rejected_reason == "the file ends after frame 20, of 30 that its header or sidecar tells of"


def test_variable_rate_is_made_even(tmp_path: Path, frames: np.ndarray) -> None:
    # 20 frames in 2 s: twice as fast in the first half second, a still of 0.6 s, then one each 0.1 s.
    times = [*range(0, 500, 50), *range(1100, 2100, 100)]
    path = faulty_files.write(tmp_path / "v.mkv", frames, container="matroska", times_ms=times, options={"bf": "0"})
    decoded = decode_span(path, start_frame=0, end_frame=None, fps=10.0, size=(64, 96))
    shown = [int(np.argmin([apart(f, g) for g in frames])) for f in decoded.frames]
    assert len(shown) == 21
    assert shown[11:] == list(range(10, 20))  # in time from 1.1 s on
    assert set(shown[5:11]) == {shown[5]} and shown[:5] == sorted(shown[:5])
    assert decoded.num_uneven >= 10
    later = decode_span(path, start_frame=8, end_frame=14, fps=10.0, size=(64, 96))
    assert [int(np.argmin([apart(f, g) for g in frames])) for f in later.frames] == shown[8:14]


def test_even_rates_are_left_alone(tmp_path: Path, frames: np.ndarray) -> None:
    for fps in (23.976, 29.97, 12.5):
        assert decode(write_video(tmp_path / f"{fps}.mp4", frames, fps=fps)).num_uneven == 0


def test_rotated_video_comes_upright(tmp_path: Path, frames: np.ndarray) -> None:
    path = faulty_files.turn_clockwise(write_video(tmp_path / "v.mp4", frames, fps=10))
    decoded = decode(path, size=(96, 64))
    assert (decoded.source_height, decoded.source_width) == (96, 64)
    assert apart(decoded.frames[0], np.rot90(frames[0], k=-1)) < 8


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("libx264", "yuv420p10le"), ("libx265", "yuv422p10le"), ("ffv1", "gray")]
)
def test_unusual_pixels_become_rgb(tmp_path: Path, frames: np.ndarray, codec: str, pix_fmt: str) -> None:
    path = faulty_files.write(tmp_path / "v.mkv", frames, codec=codec, pix_fmt=pix_fmt, container="matroska")
    decoded = decode(path)
    assert decoded.frames[0].dtype == np.uint8 and len(decoded.frames) == 20
    shown, expected = decoded.frames[3].astype(float).mean(-1), frames[3].astype(float) @ (0.299, 0.587, 0.114)
    if pix_fmt == "gray":
        assert apart(shown, expected) < 3
    else:
        assert apart(decoded.frames[3], frames[3]) < 16


def test_interlaced_video_is_deinterlaced(tmp_path: Path, config: CurationConfig) -> None:
    moving = moving_texture(24, seed=1, height=64, width=96, speed=6)
    woven = moving[::2].copy()
    woven[:, 1::2] = moving[1::2, 1::2]
    path = faulty_files.write(
        tmp_path / "v.mp4",
        woven,
        codec="mpeg2video",
        container="mpegts",
        options={"flags": "+ildct+ilme", "q": "2"},
        interlaced=True,
    )
    decoded = decode(path)

    def comb(picture: np.ndarray) -> float:
        """Differences between neighbouring lines, over those between lines of one field."""
        grey = picture.astype(float).mean(-1)
        return float(np.abs(np.diff(grey, axis=0)).mean() / np.abs(grey[2:] - grey[:-2]).mean())

    assert decoded.deinterlaced and len(decoded.frames) == 12
    assert comb(woven[5]) > 1.2 and comb(decoded.frames[5]) < 0.8
    assert {clip.record.tags for clip in split(tmp_path, config)} == {("source:interlaced",)}


def test_odd_sizes_are_cropped_to_even_ones(tmp_path: Path, config: CurationConfig) -> None:
    odd = moving_texture(20, seed=1, height=72, width=104)[:, :67, :101]
    path = faulty_files.write(tmp_path / "v.mkv", odd, codec="ffv1", pix_fmt="bgr0", container="matroska")
    decoded = decode(path, size=(32, 48))
    assert decoded.frames[0].shape == (32, 48, 3) and decoded.source_height == 67


def test_huge_frames_are_refused_before_and_while_decoding(tmp_path: Path, frames: np.ndarray) -> None:
    path = write_video(tmp_path / "v.mp4", frames, fps=10)
    with pytest.raises(UnusableVideoError, match="96x64 are over 6,000 pixels"):
        probe(path, max_pixels=6000)
    # A header that tells of less than its pictures have.
    faulty_files.claim_size(path, 16, 16)
    decoded = decode(path, limits=DecodeLimits(max_pixels=6000))
    assert not decoded.frames and "96x64 are over 6,000 pixels" in decoded.error


def test_rates_and_lengths_that_nobody_films_at_are_refused(tmp_path: Path, config: CurationConfig) -> None:
    frames = moving_texture(20, seed=1, height=64, width=96)
    write_video(tmp_path / "fast.mp4", frames, fps=1000)
    (span,) = plan_spans(tmp_path, None, config)
    assert span.error == "1000 frames per second are over 240"
    (span,) = plan_spans(tmp_path, None, replace(config, max_source_fps=1000))
    assert span.error is None
    times = [*range(0, 1900, 100), 10**9]
    long = faulty_files.write(tmp_path / "long.mkv", frames, container="matroska", times_ms=times, options={"bf": "0"})
    with pytest.raises(UnusableVideoError, match="its header tells of 278 hours"):
        probe(long)


def test_opening_ends_in_time(tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_video(tmp_path / "v.mp4", frames, fps=10).read_bytes()
    monkeypatch.setattr(fsspec, "open", lambda *_: contextlib.closing(io.BytesIO(data)))
    monkeypatch.setattr(decoding, "within", lambda _, work: work())  # this is of the clocks inside
    assert probe("far://v.mp4").num_frames == 20
    for late in ("far://v.mp4", tmp_path / "v.mp4"):
        with pytest.raises(UnusableVideoError, match="opening took longer than 1e-09 s"):
            probe(late, timeout_s=1e-9)
        limits = DecodeLimits(timeout_s=1e-9)
        decoded = decode_span(late, start_frame=0, end_frame=None, fps=10.0, size=(64, 96), limits=limits)
        assert "opening took longer than 1e-09 s" in decoded.error and decoded.failed


def test_finding_a_length_that_no_header_tells_ends_in_time(
    tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = faulty_files.write(tmp_path / "v.mkv", frames, container="matroska", container_options={"live": "1"})
    assert probe(path).num_frames == 19  # up to the last frame's start
    clock = iter(range(1000))
    monkeypatch.setattr(source_frames.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(UnusableVideoError, match="finding its length took longer than 5 s"):
        probe(path, timeout_s=5)


def test_decoding_ends_in_time(tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", frames, fps=10)
    clock = iter(range(1000))
    monkeypatch.setattr(source_frames.time, "monotonic", lambda: float(next(clock)))
    decoded = decode(path, limits=DecodeLimits(timeout_s=5))
    assert len(decoded.frames) < 20 and "took longer than 5 s" in decoded.error


def test_a_call_that_never_returns_is_given_up(
    tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # to open it waits for somebody who writes
    with pytest.raises(UnusableVideoError, match="nothing came back for 0.2 s"):
        probe(tmp_path / "pipe.mp4", timeout_s=0.1)
    path, released = write_video(tmp_path / "v.mp4", frames, fps=10), threading.Event()
    source_frames_of = decoding.source_frames

    def stalling(*given: object, **options: object) -> Iterator[SourceFrame]:
        for number, frame in enumerate(source_frames_of(*given, **options)):
            assert number < 5 or released.wait(60)
            yield frame

    monkeypatch.setattr(decoding, "source_frames", stalling)
    before = set(threading.enumerate())
    decoded = decode(path, limits=DecodeLimits(timeout_s=0.5), sample_every=1)
    assert decoded.error == "cannot be decoded after frame 5 (nothing came back for 1 s)" and decoded.failed
    released.set()
    for late in set(threading.enumerate()) - before:
        late.join()
    assert len(decoded.frames) == len(decoded.samples) == 5  # and not what came late


@pytest.mark.parametrize("jump", [False, True], ids=["long", "jump"])
def test_more_frames_than_the_header_tells_of_take_no_memory(tmp_path: Path, frames: np.ndarray, jump: bool) -> None:
    times = [*range(0, 1900, 100), 10**9 if jump else 1900]
    path = faulty_files.write(tmp_path / "v.mkv", frames, container="matroska", times_ms=times, options={"bf": "0"})
    most = 1000 if jump else 12
    decoded = decode_span(path, start_frame=0, end_frame=None, fps=10.0, size=(64, 96), most_frames=most)
    assert len(decoded.frames) == (19 if jump else 12)
    assert f"goes on after {most} frames" in decoded.error


def write_wrong_files(folder: Path) -> Path:
    """A good video and files with something wrong, or to which something shall happen."""
    frames = moving_texture(20, seed=1, height=64, width=96)
    write_video(folder / "good.mp4", frames, fps=10)
    write_video(folder / "one.mp4", frames[:1], fps=10)
    faulty_files.write_sound(folder / "sound.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    faulty_files.write(folder / "large.mp4", np.zeros((2, 256, 400, 3), np.uint8))
    data = write_video(folder / "cut.mp4", frames, fps=10).read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    times = [*range(0, 500, 50), *range(1100, 2100, 100)]
    faulty_files.write(folder / "uneven.mkv", frames, container="matroska", times_ms=times)
    # The only place of its second shot that a sample is due at, 15, has no frame of its own.
    shots = np.concatenate([frames[:11], moving_texture(9, seed=5, height=64, width=96, speed=1)])
    places = [place for place in range(20) if place != 15]
    times = [100 * place for place in places]
    faulty_files.write(folder / "gap.mkv", shots[places], container="matroska", times_ms=times, options={"bf": "0"})
    os.mkfifo(folder / "pipe.mp4")
    write_video(folder / "locked" / "v.mp4", frames, fps=10)
    for name, seed in (("flaky", 6), ("odd", 7), ("stuck", 8)):
        write_video(folder / f"{name}.mp4", moving_texture(20, seed=seed, height=64, width=96), fps=10)
    return folder


def test_what_is_wrong_becomes_a_row_and_the_rest_goes_on(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_wrong_files(tmp_path / "in")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("locked"):  # the superuser may read what others may not
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    opened, source_frames_of, scores_of = decoding.opened, decoding.source_frames, quality._scores_of

    def out_of_reach(path: str, **options: object) -> object:
        if path.endswith("flaky.mp4"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, **options)

    def stuck(container: InputContainer, **options: object) -> Iterator[SourceFrame]:
        assert not container.name.endswith("stuck.mp4") or threading.Event().wait(60)
        return source_frames_of(container, **options)

    def failing(clip: Clip) -> dict[str, float]:
        if clip.record.source_video == "odd.mp4":
            raise ValueError("a picture of no kind")
        return scores_of(clip)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(decoding, "opened", out_of_reach)
    monkeypatch.setattr(decoding, "source_frames", stuck)
    monkeypatch.setattr(quality, "_scores_of", failing)
    monkeypatch.setattr(InProcessExecutor, "_num_workers", lambda *_: 1)  # other processes would know of none of these
    config = replace(config, max_source_pixels=100_000, decode_timeout_s=1.5)
    curate(folder, tmp_path / "out", config, progress=False)
    assert "odd.mp4: quality failed" in caplog.text and "in failing" in caplog.text  # with its traceback
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    told = {row["source_video"]: row for row in rows}
    assert told["good.mp4"]["kept"] and told["uneven.mkv"]["rejected_by"] in (None, "semantic_dedup")
    assert "source:variable_frame_rate" in told["uneven.mkv"]["tags"]
    assert [r["num_frames"] for r in rows if r["source_video"] == "gap.mkv" and r["score_sharpness"]] == [11, 9]
    by = ("read", "shot_split", "quality")
    reasons = {name: row["rejected_reason"] for name, row in told.items() if row["rejected_by"] in by}
    for name, part in {
        "one.mp4": "a single frame",
        "sound.mp4": "no video stream",
        "empty.mp4": "0 bytes",
        "large.mp4": "frames of 400x256 are over 100,000 pixels",
        "cut.mp4": "cannot be opened as a video",
        "pipe.mp4": "is no file",
        "locked/": "the folder cannot be read (Permission denied)",
        "flaky.mp4": "cannot be opened as a video (Input/output error)",
        "odd.mp4": "ValueError: a picture of no kind",
        "stuck.mp4": "cannot be decoded after frame 0 (nothing came back for 3 s)",
    }.items():
        assert part in reasons.pop(name)
    assert not reasons
    # What failed is tried anew by the next run; what a rule rejected is not.
    monkeypatch.undo()
    again = curate(folder, tmp_path / "out", config, progress=False)
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    told = {row["source_video"]: row for row in rows}
    assert all(told[name]["rejected_by"] in (None, "semantic_dedup") for name in ("flaky.mp4", "odd.mp4", "stuck.mp4"))
    assert again.rejected["read"] == 5 and "quality" not in again.rejected
    assert curate(folder, tmp_path / "out", config, progress=False).unchanged


class AcceleratorError(RuntimeError):
    """Named as torch's, which a GPU raises that a kernel has spoilt."""


@pytest.mark.parametrize(
    "error",
    [UserError("no"), ImportError("no"), OSError(errno.ENOSPC, "full"), AcceleratorError("no"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_what_concerns_all_clips_ends_the_run(error: BaseException) -> None:
    video = RawVideo(source="s", rollout="a", fps=10.0, num_frames=9, split="train")
    clip = empty_clip(VideoSpan(path="a", source_video="a", key="k", video=video, simulated=False), "read", "")
    with pytest.raises(type(error)), failing_alone(clip, "embed"):
        raise error
    with failing_alone(clip, "embed"):
        raise MemoryError("no room")
    assert clip.failed and (clip.record.rejected_by, clip.record.rejected_reason) == ("embed", "MemoryError: no room")


def test_full_disk_ends_the_run_with_its_reason_and_it_goes_on_afterwards(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes, written = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".mp4":
            written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="disk is full"):
            curate(videos, tmp_path / "out", config, progress=False)
    assert len(list((tmp_path / "out" / ".work" / "spans").glob("*/result.json"))) >= 1
    assert curate(videos, tmp_path / "out", config, progress=False).num_kept


def test_huge_file_of_stills_takes_little_memory_and_time(tmp_path: Path) -> None:
    path = faulty_files.write(tmp_path / "v.mp4", np.zeros((3, 2160, 3840, 3), np.uint8))
    started = time.monotonic()
    decoded = decode(path, sample_every=1)
    assert decoded.samples[0].shape == (540, 960, 3)
    assert time.monotonic() - started < 30
