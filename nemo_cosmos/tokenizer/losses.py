"""What a reconstruction is measured by in training.

Shape letters: B batch, C colours, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.startup import run_seed

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, video), both [B, C, T, H, W] in [-1, 1] -> scalar."""

_PIXEL_RANGE = 2.0


class SparsePerceptual:
    """A distance between pictures as a distance between videos, on a few frames of each.

    Looking at every frame would cost several times the tokenizer itself. The frames are drawn from the seed that the
    strategy has given torch for this step: they are the same on all data-parallel ranks and in all micro-batches, so
    that the loss does not depend on how a batch is divided.

    Args:
        distance: (x, y), both [B, C, H, W] in [-1, 1] -> [B]; moved to the video's device at its first use.
        num_frames: Frames looked at.
    """

    def __init__(self, distance: nn.Module, *, num_frames: int = 1) -> None:
        self._distance = distance
        self._num_frames = num_frames

    def __call__(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> Tensor:
        """Mean distance over the batch and the drawn frames; convolutions run in bf16."""
        device = video_BCTHW.device
        # A generator of its own: how far torch's has been turned depends on the micro-batches before.
        generator = torch.Generator().manual_seed(run_seed())
        picked = torch.randperm(video_BCTHW.shape[2], generator=generator)[: self._num_frames].to(device)
        x_NCHW, y_NCHW = (
            rearrange(video[:, :, picked], "B C T H W -> (B T) C H W") for video in (reconstruction_BCTHW, video_BCTHW)
        )
        with torch.autocast(device.type, torch.bfloat16):
            return self._distance.to(device)(x_NCHW, y_NCHW).float().mean()


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the first training stage's terms."""

    l1_weight: float = 1.0
    """Of the mean absolute error of the pixels."""
    perceptual_weight: float = 0.0
    """Of the perceptual distance that the model was given; the reference uses 0.1."""

    def __post_init__(self) -> None:
        """Checks the weights.

        Raises:
            UserError: A weight is negative, or all are zero.
        """
        if min(self.l1_weight, self.perceptual_weight) < 0 or self.l1_weight + self.perceptual_weight == 0:
            raise user_error("loss weights", self, "none negative and one positive", "Correct the loss config.")


@dataclass(frozen=True, kw_only=True)
class ReconstructionLoss:
    """The loss and its parts, each a scalar over the batch."""

    total: Tensor
    """What is minimised."""
    l1: Tensor
    """Mean absolute error, detached."""
    mse: Tensor
    """Mean squared error of the reconstruction clamped to [-1, 1], detached."""


def reconstruction_loss(
    reconstruction_BCTHW: Tensor,
    video_BCTHW: Tensor,
    *,
    config: LossConfig,
    perceptual: PerceptualDistance | None = None,
) -> ReconstructionLoss:
    """First-stage loss of the tokenizer: colour, and perceptual distance where one is given.

    Args:
        reconstruction_BCTHW: What the tokenizer made, float [B, C, T, H, W].
        video_BCTHW: What it should be, the same shape, in [-1, 1].
        config: The terms' weights.
        perceptual: Needed where its weight is positive.

    Raises:
        UserError: A perceptual term is wanted, but no distance was given.

    Source: arXiv 2501.03575 section 4.2.
    """
    # In float32 whatever the model's precision, since means of bf16 differences lose most of their digits.
    error_BCTHW = reconstruction_BCTHW.float() - video_BCTHW.float()
    l1 = error_BCTHW.abs().mean()
    total = config.l1_weight * l1
    if config.perceptual_weight > 0:
        if perceptual is None:
            raise user_error(
                "perceptual_weight", config.perceptual_weight, "0 without a distance", "Give `perceptual`."
            )
        total = total + config.perceptual_weight * perceptual(reconstruction_BCTHW, video_BCTHW)
    with torch.no_grad():
        mse = (reconstruction_BCTHW.float().clamp(-1, 1) - video_BCTHW.float()).square().mean()
    return ReconstructionLoss(total=total, l1=l1.detach(), mse=mse)


def psnr_db(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error between pixels in [-1, 1]."""
    return 10 * torch.log10(_PIXEL_RANGE**2 / mse.clamp_min(1e-10))
