"""The diffusion decoder's loss on what its estimates show."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_cosmos.autoregressive.diffusion_decoder.pixel_loss import SEEN, DecoderLossReduction, PixelLoss
from nemo_cosmos.data.latent_cache import normalise_latent
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.losses import LossConfig
from nemo_cosmos.tokenizer.statistics import LatentStatistics
from nemo_cosmos.tokenizer.weights import load_default

STATISTICS = LatentStatistics(mean=tuple(0.1 * i for i in range(16)), std=tuple(0.5 + 0.2 * i for i in range(16)))
EDM_HALF = EDM(sigma_data=0.5)


def pixel_loss(**settings: float) -> PixelLoss:
    return PixelLoss(loss=LossConfig(), **settings)


def batch(size: int = 4, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the model gives to its loss, for samples of which the first and the last are seen."""
    generator = torch.Generator().manual_seed(seed)
    clean = 0.5 * torch.randn(size, 16, 2, 4, 4, generator=generator)
    sigma = torch.rand(size, generator=generator) + 0.5
    given = {
        "clean": clean,
        "noisy": clean + sigma.view(-1, 1, 1, 1, 1) * torch.randn(clean.shape, generator=generator),
        "sigma": sigma,
        "free": torch.ones(size, 1, 2, 4, 4),
        SEEN: torch.tensor([True, *[False] * (size - 2), True]),
    }
    output = torch.randn(clean.shape, generator=generator).requires_grad_()
    return given, {"network_output": output, "logvar": torch.zeros(size)}


def reduction(loss: PixelLoss | None) -> DecoderLossReduction:
    return DecoderLossReduction(EDM_HALF, loss, lambda: STATISTICS)


def cut(tensors: dict[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[part] for name, tensor in tensors.items()}


def test_it_is_the_distance_of_what_the_tokenizer_decodes() -> None:
    tokenizer = load_default()
    with torch.no_grad():
        truth = tokenizer.encode(torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1)
        other = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
        expected = (tokenizer.decode(other) - tokenizer.decode(truth).clamp(-1, 1)).abs().mean()
    numbers = STATISTICS.of(2)
    got = pixel_loss()(normalise_latent(other, *numbers), normalise_latent(truth, *numbers), STATISTICS)
    assert got.item() == pytest.approx(expected.item(), rel=0.02)  # convolutions in bf16


def test_it_comes_to_the_edm_loss_by_its_weight_and_reaches_the_seen_samples_alone() -> None:
    given, out = batch()
    plain, _ = reduction(None).forward(given, out)
    once, told = reduction(pixel_loss(weight=1.0, share=0.5)).forward(given, out)
    thrice, _ = reduction(pixel_loss(weight=3.0, share=0.5)).forward(given, out)
    denoised = EDM_HALF.denoised(given["noisy"], out["network_output"], given["sigma"])[given[SEEN]]
    # The tokenizer's latents have unit variance when they are normalised, the network's that of `sigma_data`.
    expected = pixel_loss()(denoised / 0.5, given["clean"][given[SEEN]] / 0.5, STATISTICS)
    assert told["pixel"].item() == pytest.approx(expected.item(), rel=1e-5)  # half are seen, as is expected
    assert (once - plain).item() == pytest.approx(told["pixel"].item(), rel=1e-5)
    assert (thrice - plain).item() == pytest.approx(3 * told["pixel"].item(), rel=1e-5)
    assert told["avg"].item() == pytest.approx(once.item())
    (gradient,) = torch.autograd.grad(once - plain, out["network_output"])
    assert gradient.flatten(1).abs().sum(1).bool().tolist() == given[SEEN].tolist()


def test_the_mean_over_micro_batches_does_not_depend_on_how_a_batch_is_divided() -> None:
    given, out = batch()
    loss = reduction(pixel_loss(share=0.25))
    whole, _ = loss.forward(given, out)
    for cuts in ((slice(0, 2), slice(2, 4)), tuple(slice(i, i + 1) for i in range(4))):
        parts = [loss.forward(cut(given, part), cut(out, part))[0] for part in cuts]
        # The parts' convolutions round in bf16 as the whole one's do, sums in another order.
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-3)


def test_samples_are_drawn_by_their_keys() -> None:
    loss = pixel_loss(share=0.25)
    drawn = loss.drawn(range(2000), seed=7)
    assert 420 < drawn.sum() < 580  # 500 expected, deviation 19
    assert torch.equal(loss.drawn([1999, 3], seed=7), drawn[[1999, 3]])
    assert not torch.equal(loss.drawn(range(2000), seed=8), drawn)


def test_what_does_not_fit_is_refused() -> None:
    for settings in ({"weight": 0.0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(UserError, match="weight, share"):
            pixel_loss(**settings)
    with pytest.raises(UserError, match="perceptual_weight"):
        PixelLoss(loss=LossConfig(perceptual_weight=0.1))
    loss = pixel_loss()
    loss.check_latents_of(load_default().fingerprint())
    with pytest.raises(UserError, match="tokenizer of the pixel loss: got 'default, "):
        loss.check_latents_of("another")
    assert "tokenizer" in vars(loss) and "tokenizer" not in vars(copy.deepcopy(loss)), "checkpoints would hold it"
