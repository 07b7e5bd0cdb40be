import math

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.losses import LossConfig, psnr_db, reconstruction_loss

SHAPE = (1, 3, 1, 4, 4)


def test_l1_and_clamped_mse() -> None:
    video, reconstruction = torch.zeros(SHAPE), torch.full(SHAPE, 3.0, requires_grad=True)
    loss = reconstruction_loss(reconstruction, video, config=LossConfig(l1_weight=0.5))
    assert (loss.total.item(), loss.l1.item(), loss.mse.item()) == (1.5, 3.0, 1.0)
    loss.total.backward()
    assert torch.allclose(reconstruction.grad, torch.full(SHAPE, 0.5 / 48))
    assert not loss.l1.requires_grad
    assert not loss.mse.requires_grad


def test_perceptual_term_is_added() -> None:
    video, reconstruction = torch.zeros(SHAPE), torch.ones(SHAPE)
    loss = reconstruction_loss(
        reconstruction,
        video,
        config=LossConfig(perceptual_weight=0.1),
        perceptual=lambda ours, theirs: (ours - theirs).sum(),
    )
    assert loss.total.item() == pytest.approx(1 + 4.8)


def test_wanted_but_missing_distance_is_refused() -> None:
    with pytest.raises(UserError, match="perceptual_weight: got 0.1"):
        reconstruction_loss(torch.ones(SHAPE), torch.ones(SHAPE), config=LossConfig(perceptual_weight=0.1))


@pytest.mark.parametrize("values", [{"l1_weight": -1.0}, {"l1_weight": 0.0}])
def test_bad_weights_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match="loss weights"):
        LossConfig(**values)


def test_bf16_reconstructions_are_compared_in_float32() -> None:
    video = torch.full(SHAPE, 1 / 3)
    loss = reconstruction_loss(video.bfloat16(), video, config=LossConfig())
    assert loss.l1.dtype == torch.float32
    assert loss.l1.item() == pytest.approx(abs(video.bfloat16().float() - video).mean().item())


def test_psnr() -> None:
    assert psnr_db(torch.tensor(4.0)).item() == 0.0
    assert psnr_db(torch.tensor(0.04)).item() == pytest.approx(20.0)
    assert math.isfinite(psnr_db(torch.tensor(0.0)).item())
