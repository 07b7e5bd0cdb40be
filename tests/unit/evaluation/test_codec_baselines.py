from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation import codec_baselines
from nemo_cosmos.evaluation.codec_baselines import LatentRate, bicubic, block_dct
from nemo_cosmos.evaluation.metrics import psnr


@pytest.fixture
def video(moving_square) -> np.ndarray:
    return moving_square(seed=3, speed=2.0, num_frames=9, size=64)


def test_the_rate_counts_the_tiny_tokenizers_latent():
    # 17x128x128 becomes 16 x 3 x 16 x 16.
    assert LatentRate().num_stored(17, 128, 128) == 12288
    assert LatentRate(temporal=4).num_stored(9, 64, 64) == 16 * 3 * 8 * 8


@pytest.mark.parametrize("size", [(16, 64, 64), (17, 60, 64), (17, 64, 60)])
@pytest.mark.parametrize("baseline", [bicubic, block_dct])
def test_sizes_that_the_tokenizer_does_not_take_are_refused(baseline, size):
    with pytest.raises(UserError, match=r"1 \+ 8n"):
        baseline(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("baseline", [bicubic, block_dct])
def test_flat_video_comes_back_and_detail_is_lost(baseline, video):
    flat = np.broadcast_to(np.array([30, 90, 200], np.uint8), (9, 16, 16, 3)).copy()
    # One grey level of rounding, two where colours are converted both ways.
    assert np.abs(baseline(flat).astype(int) - flat).max() <= 2
    restored = baseline(video)
    assert restored.shape == video.shape
    assert 15 < psnr(video, restored).mean() < 50


def test_bicubic_keeps_no_more_than_the_rate(video, monkeypatch):
    kept = []
    real = codec_baselines._cubic

    def counting(video, num_frames, height, width):
        kept.append(3 * num_frames * height * width)
        return real(video, num_frames, height, width)

    monkeypatch.setattr(codec_baselines, "_cubic", counting)
    bicubic(video)
    stored = kept[::2]
    budget = LatentRate().num_stored(9, 64, 64)
    assert len(stored) == 5  # 9, 5, 3, 2 and 1 frames
    assert max(stored) <= budget
    assert max(stored) > 0.9 * budget


def test_dct_spends_sixteen_numbers_per_block():
    noise = np.random.default_rng(0).normal(0, 1, (16, 16, 24)).astype(np.float32)
    lowest = codec_baselines._lowest_frequencies(noise, (8, 8, 8), 12)
    from scipy.fft import dctn

    block = dctn(lowest[8:, 8:, 16:], norm="ortho")
    assert (np.abs(block) > 1e-5).sum() == 12
    # Eleven coefficients have a squared frequency of 4 or less; the twelfth is one of the six with 5.
    u, v, w = np.nonzero(np.abs(block) > 1e-5)
    assert sorted(u**2 + v**2 + w**2) == [0, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 5]


def test_keeping_everything_changes_nothing():
    noise = np.random.default_rng(0).normal(0, 50, (8, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(codec_baselines._lowest_frequencies(noise, (8, 8, 8), 512), noise, atol=1e-3)


def test_a_higher_rate_is_never_worse(video):
    for baseline in (bicubic, block_dct):
        low = psnr(video, baseline(video, LatentRate(channels=16))).mean()
        high = psnr(video, baseline(video, LatentRate(channels=64))).mean()
        assert high > low + 1
