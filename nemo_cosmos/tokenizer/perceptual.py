"""Distances between videos in the features of a network that was trained on pictures.

Shape letters: B batch, C colours, T frames, H height, W width, N pictures, K features, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from nemo_cosmos.parallel.startup import run_seed

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, video), both [B, C, T, H, W] in [-1, 1] -> scalar."""

LAYER_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
"""Of VGG16's five stages. Source: cosmos-predict1, `PerceptualConfig`."""


class PictureFeatures(Protocol):
    """A network such as `nemo_cosmos.evaluation.vgg.Vgg16`."""

    name: str
    """Which weights it has, for log and card."""

    def to(self, device: torch.device) -> PictureFeatures:
        """Moves the weights."""

    def __call__(self, x_NCHW: Tensor) -> list[Tensor]:
        """[N, 3, H, W] in [-1, 1] -> one map [N, K, H', W'] per stage, differentiable."""


class SparsePerceptual:
    """A distance between pictures as a distance between videos, on a few frames of each.

    Looking at every frame would cost several times the tokenizer itself.

    Args:
        distance: (x, y), both [B, C, H, W] in [-1, 1] -> [B]; moved to the video's device at its first use.
        num_frames: Frames looked at, see `drawn_frames`.
    """

    def __init__(self, distance: nn.Module, *, num_frames: int = 1) -> None:
        self._distance = distance
        self._num_frames = num_frames
        self.name = getattr(distance, "name", type(distance).__name__)

    def __call__(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> Tensor:
        """Mean distance over the batch and the drawn frames; convolutions run in bf16."""
        device = video_BCTHW.device
        picked = drawn_frames(video_BCTHW.shape[2], self._num_frames).to(device)
        x_NCHW, y_NCHW = (
            rearrange(video[:, :, picked], "B C T H W -> (B T) C H W") for video in (reconstruction_BCTHW, video_BCTHW)
        )
        with torch.autocast(device.type, torch.bfloat16):
            return self._distance.to(device)(x_NCHW, y_NCHW).float().mean()


class VggPerceptual:
    """The published distance: features compared as they are, stage by stage; and of their Gram matrices.

    Unlike LPIPS it neither normalises the features nor has trained heads.

    Args:
        features: The network; moved to the video's device at its first use.
        num_frames: Frames looked at, see `drawn_frames`; None for all, as published.
        layer_weights: Of the stages.

    Source: cosmos-predict1, `PerceptualLoss`.
    """

    def __init__(
        self,
        features: PictureFeatures,
        *,
        num_frames: int | None = None,
        layer_weights: tuple[float, ...] = LAYER_WEIGHTS,
    ) -> None:
        self._features = features
        self._num_frames = num_frames
        self._layer_weights = layer_weights
        self.name = features.name

    def __call__(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> Tensor:
        """Mean absolute difference of the features, summed over the stages by their weights."""
        perceptual = [(x - y).abs().mean() for x, y in self._compared(reconstruction_BCTHW, video_BCTHW)]
        return self._weighted(perceptual)

    def with_gram(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """The distance, and the mean squared difference of the Gram matrices over all positions of a video."""
        perceptual, gram = [], []
        for x_BTKHW, y_BTKHW in self._compared(reconstruction_BCTHW, video_BCTHW):
            perceptual.append((x_BTKHW - y_BTKHW).abs().mean())
            gram.append((gram_matrix(x_BTKHW) - gram_matrix(y_BTKHW)).square().mean())
        return self._weighted(perceptual), self._weighted(gram)

    def _compared(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Float32 features of both by stage; convolutions run in bf16."""
        device, (batch_size, _, length, _, _) = video_BCTHW.device, video_BCTHW.shape
        picked = drawn_frames(length, self._num_frames or length).to(device)
        network = self._features.to(device)
        both = []
        for video in (reconstruction_BCTHW, video_BCTHW):
            with torch.autocast(device.type, torch.bfloat16):
                maps = network(rearrange(video[:, :, picked], "B C T H W -> (B T) C H W"))
            both.append([rearrange(x.float(), "(B T) K H W -> B T K H W", B=batch_size) for x in maps])
        return list(zip(*both, strict=True))

    def _weighted(self, by_stage: list[Tensor]) -> Tensor:
        return torch.stack([w * value for w, value in zip(self._layer_weights, by_stage, strict=True)]).sum()


def gram_matrix(x_BTKHW: Tensor) -> Tensor:
    """Mean products of features over a video's frames and pixels: [B, T, K, H, W] -> [B, K, K]."""
    x_BKP = rearrange(x_BTKHW, "B T K H W -> B K (T H W)")
    return x_BKP @ x_BKP.mT / x_BKP.shape[2]


def drawn_frames(length: int, num_frames: int) -> Tensor:
    """Draws frames for one optimizer step.

    The draw depends on nothing but the seed that the strategy has given torch for this step: it is the same on all
    data-parallel ranks and in all micro-batches, so that the loss does not depend on how a batch is divided.

    Args:
        length: Frames of the video.
        num_frames: How many of them; all where it is more.

    Returns:
        int64 [min(num_frames, length)] on the CPU, in any order.
    """
    # A generator of its own: how far torch's has been turned depends on the micro-batches before.
    return torch.randperm(length, generator=step_generator())[:num_frames]


def step_generator() -> torch.Generator:
    """A generator that starts the same in every micro-batch and on every rank of an optimizer step."""
    return torch.Generator().manual_seed(run_seed())
