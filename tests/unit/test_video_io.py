from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from nemo_cosmos import video_io
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import (
    probe_video,
    read_video,
    resize_frames,
    stream_video,
    to_model,
    to_pixels,
    write_video,
)


@pytest.fixture
def frames() -> np.ndarray:
    """A smooth colour ramp that moves; uint8 [9, 48, 64, 3]."""
    x = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    rows = [np.stack([np.sin(x + 0.2 * t + phase) for phase in (0, 2, 4)], axis=-1) for t in range(9)]
    return np.stack([np.broadcast_to((row * 80 + 128).round().astype(np.uint8), (48, 64, 3)) for row in rows])


def test_what_is_written_is_read_back(tmp_path, frames):
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    decoded, fps = read_video(path)
    assert fps == 10
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    # Chroma is halved and the codec is lossy: three grey levels on a smooth picture.
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    # The order of frames and of colours is kept.
    errors = [np.abs(decoded[4].astype(int) - frame).mean() for frame in frames]
    assert np.argmin(errors) == 4
    assert np.abs(decoded[..., ::-1].astype(int) - frames).mean() > 20


@pytest.mark.parametrize("fps", [10.0, 24, 29.97, 0.5])
def test_the_frame_rate_is_kept(tmp_path, frames, fps):
    assert read_video(write_video(tmp_path / "clip.mp4", frames, fps=fps))[1] == pytest.approx(fps, rel=1e-3)


def test_reading_can_stop_early(tmp_path, frames):
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    np.testing.assert_array_equal(read_video(path, max_frames=3)[0], read_video(path)[0][:3])


@pytest.fixture
def long(tmp_path) -> Path:
    """33 frames with a key frame every eighth and frames between that look ahead."""
    path, moving = tmp_path / "long.mp4", np.random.default_rng(0).integers(0, 255, (33, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.options = {"g": "8", "bf": "3", "b_strategy": "0", "sc_threshold": "0"}
        for picture in moving:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("as_bytes", [False, True])
def test_reading_can_begin_anywhere(long, as_bytes):
    source, (whole, _) = long.read_bytes() if as_bytes else long, read_video(long)
    assert len(whole) == 33
    for start in range(33):
        np.testing.assert_array_equal(read_video(source, first_frame=start, max_frames=3)[0], whole[start : start + 3])
    with pytest.raises(UserError, match="0 frames"):
        read_video(source, first_frame=33)


def test_no_more_than_a_group_of_pictures_is_decoded_before_the_first_frame_wanted(long):
    with video_io._opened(long, "long") as (container, stream):
        times = video_io._times(long, "long")
        for start in range(33):
            first = next(video_io._from_key_frame(container, stream, times[0], times[start]))
            assert times.index(first.pts) == start // 8 * 8


def test_a_file_that_does_not_tell_times_is_read_from_its_start(long, tmp_path):
    bare = tmp_path / "bare.h264"
    with av.open(str(long)) as container, av.open(str(bare), "w", format="h264") as output:
        stream = output.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    whole, _ = read_video(bare)
    np.testing.assert_array_equal(read_video(bare, first_frame=10, max_frames=3)[0], whole[10:13])


def test_frames_come_one_by_one(tmp_path, frames):
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    np.testing.assert_array_equal(np.stack(list(stream_video(path))), read_video(path)[0])
    assert len(list(stream_video(path, max_frames=3))) == 3
    assert probe_video(path) == (9, 10.0)


@pytest.mark.parametrize("read", [read_video, probe_video, lambda path: list(stream_video(path))])
@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_a_corrupt_file_is_named(tmp_path, frames, damage, read):
    path = write_video(tmp_path / "clip.mp4", frames, fps=10)
    content = path.read_bytes()
    path.write_bytes({"text": b"this is not a video", "empty": b"", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(UserError) as raised:
        read(path)
    assert str(raised.value) == (
        f"{path}: got 'Invalid data found when processing input', expected a video that can be decoded. "
        "The file is corrupt, empty or no video: fetch or write it again, or remove it."
    )


def test_a_video_without_frames_is_named(tmp_path):
    import av

    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        container.start_encoding()
    with pytest.raises(UserError, match=r"clip\.avi: got '0 frames at 10 per second', expected .* The file is corrupt"):
        read_video(path)


def test_a_missing_file_and_sound_alone_are_told_apart(tmp_path):
    import av

    with pytest.raises(UserError, match="no such video file"):
        read_video(tmp_path / "gone.mp4")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream"):
        read_video(path)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 15, 16, 3), np.uint8),
        np.zeros((2, 16, 17, 3), np.uint8),
        np.zeros((3, 2, 16, 16), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="even H and W"):
        write_video(tmp_path / "clip.mp4", wrong, fps=10)
    assert os.listdir(tmp_path) == []


def test_resizing_covers_and_crops_the_centre():
    wide = np.zeros((2, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 255
    assert (resize_frames(wide, 16, 16) == 255).all()
    assert (resize_frames(wide, 64, 64)[:, :, 8:-8] == 255).all()
    tall = wide.transpose(0, 2, 1, 3)
    assert (resize_frames(tall, 16, 16) == 255).all()
    assert resize_frames(wide, 32, 96) is wide


def test_resizing_keeps_the_mean_of_noise():
    noise = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
    # Averages of 16 pixels: the mean stays within the rounding of each.
    small = resize_frames(noise, 32, 32)
    assert small.mean() == pytest.approx(noise.mean(), abs=0.5)
    assert small.std() < noise.std() / 3


def test_all_grey_levels_survive_the_way_to_the_model_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    video = to_model(levels)
    assert video.shape == (3, 1, 16, 16)
    assert video.dtype == torch.float32
    assert (video.min().item(), video.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(video), levels)


def test_values_outside_the_range_are_clamped():
    video = torch.tensor([-1.5, 0.0, 1.5], dtype=torch.bfloat16).reshape(3, 1, 1, 1)
    assert to_pixels(video).reshape(-1).tolist() == [0, 128, 255]
