from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.evaluation import rate_distortion
from nemo_cosmos.evaluation.rate_distortion import CODECS, RatePoint, encode_with, mean_curve, psnr_at


@pytest.fixture
def noisy(moving_square) -> np.ndarray:
    """A moving square under noise, which costs bits at low CRF; odd sizes, uint8 [9, 63, 61, 3]."""
    video = moving_square(seed=0, speed=2.0, num_frames=9)[:, :63, :61]
    noise = np.random.default_rng(0).normal(0, 6, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_bits_and_quality_fall_with_crf(codec, noisy):
    if not codec.is_available:
        pytest.skip(f"this PyAV has no {codec.encoder}")
    points = [encode_with(codec, lambda: iter(noisy), crf=crf, fps=10.0) for crf in (8, 20, 32, 44)]
    assert (np.diff([p.bits_per_pixel for p in points]) < 0).all()
    assert (np.diff([p.psnr_db for p in points]) < 0).all()
    # 4:2:0 and the way to YUV and back bound what even CRF 8 keeps of coloured noise.
    assert 30 < points[0].psnr_db < 50


def test_bits_are_those_of_the_file_by_the_pixels_of_the_video(noisy, monkeypatch):
    sizes = []
    encode = rate_distortion._encode

    def noting(codec, frames, path, **options):
        encode(codec, frames, path, **options)
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(rate_distortion, "_encode", noting)
    point = encode_with(CODECS[0], lambda: iter(noisy), crf=24, fps=10.0)
    assert point.bits_per_pixel == 8 * sizes[0] / (9 * 63 * 61)


def test_a_still_picture_is_a_video_of_one_frame(noisy):
    assert encode_with(CODECS[0], lambda: iter(noisy[:1]), crf=24, fps=1.0).psnr_db > 25


def test_curves_are_averaged_and_read_between_points():
    near = tuple(RatePoint(bits_per_pixel=b, psnr_db=p) for b, p in ((4.0, 40.0), (1.0, 30.0), (0.25, 20.0)))
    far = tuple(RatePoint(bits_per_pixel=b, psnr_db=p) for b, p in ((2.0, 38.0), (1.0, 28.0), (0.75, 18.0)))
    assert mean_curve([near, far])[0] == RatePoint(bits_per_pixel=3.0, psnr_db=39.0)
    assert psnr_at(near, 1.0) == 30.0
    # Half way on a logarithmic axis.
    assert psnr_at(near, 2.0) == pytest.approx(35.0)
    assert psnr_at(near, 4.1) is None
    assert psnr_at(near, 0.2) is None
