"""What an estimate of the latent shows, compared with what the true latent shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nemo_cosmos.data.latent_cache import denormalise_latent
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.step import Batch, DiffusionLossReduction
from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.load import load
from nemo_cosmos.tokenizer.losses import LossConfig, check_measures, reconstruction_loss
from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.perceptual import PerceptualDistance
from nemo_cosmos.tokenizer.statistics import LatentStatistics
from nemo_cosmos.tokenizer.weights import load_default

SEEN = "seen"
"""In a batch: bool [B], the samples that are decoded."""


class PixelLoss:
    """The tokenizer's loss between the decoded estimate and the decoded true latent.

    The mean square of a latent weighs its values alike, while a decoder may show some of them far more than others: an
    estimate nearer to the truth may then look worse. Not in the published training.

    Args:
        tokenizer: The continuous one, which learns nothing here: `default` for the embedded one, or any place that
            holds one.
        loss: Weights of the terms.
        perceptual: Perceptual distance, needed where `loss` gives it weight.
        weight: Of all this beside the EDM loss.
        share: Of the samples that are decoded, which are drawn anew in each step.

    Raises:
        UserError: A number is out of range, or a term has weight, but nothing measures it.
    """

    def __init__(
        self,
        tokenizer: str = "default",
        *,
        loss: LossConfig,
        perceptual: PerceptualDistance | None = None,
        weight: float = 20.0,
        share: float = 0.25,
    ) -> None:
        if weight <= 0 or not 0 < share <= 1:
            raise user_error("weight, share", (weight, share), "above 0, and share at most 1", "Correct the recipe.")
        check_measures(loss, perceptual, None)
        self.place, self.loss, self.perceptual, self.weight, self.share = tokenizer, loss, perceptual, weight, share

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The continuous tokenizer, frozen.

        Raises:
            UserError: There is none.
        """
        loaded = load_default() if self.place == "default" else load(self.place).model
        return loaded.requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights, which are read anew."""
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    def check_latents_of(self, fingerprint: str) -> None:
        """Refuses latents that the tokenizer did not make.

        Args:
            fingerprint: Of the tokenizer that made them.

        Raises:
            UserError: It is another one.
        """
        if self.tokenizer.fingerprint() != fingerprint:
            raise user_error(
                "tokenizer of the pixel loss",
                f"{self.place}, fingerprint {self.tokenizer.fingerprint()}",
                f"{fingerprint}, that of the latents",
                "Give the one that the latents were made with (model.pixel_loss.tokenizer).",
            )

    def drawn(self, draw_ids: Sequence[int], seed: int) -> torch.Tensor:
        """Whether each sample is decoded in this step, bool [B]; by its key, in whatever batch it stands."""
        # Jumped: the numbers that noise is made of come from the stream's start.
        streams = (np.random.Philox(key=[seed, draw_id]).jumped() for draw_id in draw_ids)
        return torch.tensor([np.random.Generator(stream).random() < self.share for stream in streams])

    def __call__(self, denoised: torch.Tensor, clean: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
        """Compares what latents show.

        Args:
            denoised: Estimates, B C T H W, normalised.
            clean: What they should be.
            statistics: What they are normalised by.

        Returns:
            The loss, scalar float32, differentiable in `denoised`; convolutions run in bf16.
        """
        numbers = statistics.of(clean.shape[2])
        assert numbers is not None  # of a cache of continuous latents
        tokenizer = self.tokenizer.to(denoised.device)

        def shown(latent: torch.Tensor) -> torch.Tensor:
            with torch.autocast(latent.device.type, torch.bfloat16):
                return tokenizer.decode(denormalise_latent(latent.float(), *numbers)).float()

        with torch.no_grad():
            wanted = shown(clean).clamp(-1, 1)
        return reconstruction_loss(shown(denoised), wanted, config=self.loss, perceptual=self.perceptual).total


class DecoderLossReduction(DiffusionLossReduction):
    """EDM loss and pixel loss of a micro-batch.

    Args:
        edm: Preconditioning and weights.
        pixel_loss: The latter; None leaves it out.
        statistics: Tells what latents are normalised by.
    """

    def __init__(self, edm: EDM, pixel_loss: PixelLoss | None, statistics: Callable[[], LatentStatistics]) -> None:
        super().__init__(edm)
        self._pixel_loss, self._statistics = pixel_loss, statistics

    def forward(self, batch: Batch, forward_out: dict[str, Any]) -> tuple[torch.Tensor, Batch]:
        """Adds the mean pixel loss of the drawn samples, times their share of the batch over the expected one.

        So the mean over micro-batches and ranks is the same however a batch is divided.
        """
        loss, told = super().forward(batch, forward_out)
        if self._pixel_loss is None:
            return loss, told
        seen = batch[SEEN].nonzero().flatten()
        term = loss.new_zeros(())
        if len(seen):
            noisy, clean, sigma_B = (batch[name][seen] for name in ("noisy", "clean", "sigma"))
            denoised = self._edm.denoised(noisy, forward_out["network_output"][seen], sigma_B)
            scale = self._edm.sigma_data
            rate = len(seen) / len(batch[SEEN]) / self._pixel_loss.share
            term = self._pixel_loss(denoised / scale, clean / scale, self._statistics()) * rate
        loss = loss + self._pixel_loss.weight * term
        return loss, {**told, "avg": loss.detach().clone().view(1), "pixel": term.detach().view(1)}
