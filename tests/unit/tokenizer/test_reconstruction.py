from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import build_tokenizer
from nemo_cosmos.tokenizer.reconstruction import CodingConfig, RebuiltChunk, rebuild_stream
from nemo_cosmos.tokenizer.streaming import encode_video
from nemo_cosmos.video_io import to_model, to_pixels
from tests.unit.tokenizer.conftest import random_tokenizer
from tests.unit.tokenizer.test_streaming import CONFIGS, calm


@pytest.fixture
def small():
    return calm(random_tokenizer(CONFIGS["p8 t8 s8"]))


def _video(num_frames: int, height: int = 21, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def _joined(chunks: list[RebuiltChunk]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([c.truth for c in chunks]), np.concatenate([c.rebuilt for c in chunks])


def _one_pass(tokenizer, video: np.ndarray) -> np.ndarray:
    """Pads, encodes, rounds to bf16 and decodes all at once."""
    num_frames, height, width, _ = video.shape
    pads = ((0, -(num_frames - 1) % 8), (0, -height % 8), (0, -width % 8), (0, 0))
    with torch.no_grad():
        latent = tokenizer.encode(to_model(np.pad(video, pads, mode="edge"))[None])
        decoded = tokenizer.decode(latent.bfloat16().float())[0]
    return to_pixels(decoded[:, :num_frames, :height, :width])


@pytest.mark.parametrize("num_frames", [1, 5, 17, 40])
def test_a_stream_is_rebuilt_as_in_one_pass(small, num_frames):
    video = _video(num_frames)
    chunks = list(rebuild_stream(small, iter(video)))
    truth, rebuilt = _joined(chunks)
    np.testing.assert_array_equal(truth, video)
    expected = _one_pass(small, video)
    # Sums in another order: where a latent falls on the edge of two bf16 numbers, pixels may round the other way.
    assert np.abs(rebuilt.astype(int) - expected).max() <= 2
    assert (rebuilt != expected).mean() < 0.01
    assert {c.code.dtype for c in chunks} == {torch.bfloat16}
    assert sum(c.code.numel() for c in chunks) == encode_video(small, video).latent.numel()


def test_windows_are_rebuilt_each_alone(small):
    video = _video(40)
    truth, rebuilt = _joined(list(rebuild_stream(small, iter(video), CodingConfig(temporal_window=17))))
    np.testing.assert_array_equal(truth, video)
    expected = np.concatenate([_one_pass(small, video[start : start + 17]) for start in (0, 17, 34)])
    assert np.abs(rebuilt.astype(int) - expected).max() <= 2
    assert np.abs(rebuilt.astype(int) - _one_pass(small, video)).max() > 2


def test_no_more_than_the_chunk_at_work_is_read(small):
    read = 0

    def frames():
        nonlocal read
        for frame in _video(40, 8, 8):
            read += 1
            yield frame

    counts = [(len(chunk.truth), read) for chunk in rebuild_stream(small, frames())]
    assert counts == [(17, 17), (16, 33), (7, 40)]


def test_tiles_change_large_pictures_alone(small):
    coding = CodingConfig(tile=72)
    for size, same in ((24, True), (160, False)):
        video = _video(1, 16, size)
        (whole,), (tiled,) = rebuild_stream(small, iter(video)), rebuild_stream(small, iter(video), coding)
        assert (whole.rebuilt == tiled.rebuilt).all() == same


@pytest.mark.parametrize("window", [0, 1, 16])
def test_windows_that_do_not_fit_are_refused(small, window):
    with pytest.raises(UserError, match="temporal_window: got"):
        next(rebuild_stream(small, iter(_video(17)), CodingConfig(temporal_window=window)))


def test_the_cut_is_told_in_words():
    assert CodingConfig().describe() == "one causal stream, whole pictures"
    words = CodingConfig(temporal_window=17, tile=256, max_attended_frames=4).describe()
    assert words == "windows of 17 frames, tiles of 256 pixels, attending to 4 latent frames"


def test_an_image_tokenizer_codes_every_frame_alone():
    config = TokenizerConfig(
        modality="image", channels=32, num_res_blocks=1, latent_channels=4, z_channels=4, temporal_compression=1
    )
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config).eval()
    video = _video(3)
    chunks = list(rebuild_stream(tokenizer, iter(video)))
    truth, rebuilt = _joined(chunks)
    np.testing.assert_array_equal(truth, video)
    padded = np.pad(video, ((0, 0), (0, 3), (0, 2), (0, 0)), mode="edge")
    with torch.no_grad():
        latent = tokenizer.encode(to_model(padded).transpose(0, 1)).bfloat16()
        expected = to_pixels(tokenizer.decode(latent.float()).transpose(0, 1))[:, :21, :30]
    # Sums in another order: where a latent falls on the edge of two bf16 numbers, pixels may round the other way.
    assert np.abs(rebuilt.astype(int) - expected).max() <= 2
    assert sum(chunk.code.numel() for chunk in chunks) == latent.numel()
    for size, same in ((30, True), (160, False)):
        frame = _video(1, 16, size)
        (whole,) = rebuild_stream(tokenizer, iter(frame))
        (tiled,) = rebuild_stream(tokenizer, iter(frame), CodingConfig(tile=72))
        assert (np.abs(whole.rebuilt.astype(int) - tiled.rebuilt).max() <= 2) == same
    with pytest.raises(UserError, match="temporal_window: got 17"):
        next(rebuild_stream(tokenizer, iter(video), CodingConfig(temporal_window=17)))
