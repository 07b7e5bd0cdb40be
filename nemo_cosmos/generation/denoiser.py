"""From network output to a clean-latent estimate, with guidance and given frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nemo_cosmos.diffusion.conditioning import network_input
from nemo_cosmos.diffusion.objective import EDM, per_sample


@dataclass(kw_only=True)
class VideoDenoiser:
    """The denoiser that samplers integrate, for one batch of videos.

    Source: Cosmos report (arXiv 2501.03575), section 5.1; guidance is cond + g (cond - uncond).
    """

    network: nn.Module
    """A `CosmosDiT`."""
    edm: EDM
    text_emb: torch.Tensor
    """B L D."""
    negative_text_emb: torch.Tensor
    """B L D; zeros where there is no negative prompt, as text dropout trains it."""
    fps: torch.Tensor
    """[B]."""
    given: torch.Tensor
    """Clean latent that holds the given frames, B C T H W, at `edm.sigma_data`."""
    mask: torch.Tensor
    """1 where given, B 1 T H W."""
    augment_noise: torch.Tensor
    """N(0, 1), B C T H W."""
    guidance: float = 0.0
    """g; 0 runs the conditional branch alone."""
    augment_sigma: float = 0.001
    actions: torch.Tensor | None = None
    """[B, T, actions per latent frame]."""
    video2world: bool = False
    """Whether the network has a condition-mask channel."""

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Estimates the clean latent.

        Args:
            noisy: B C T H W.
            sigma: Noise level, scalar.

        Returns:
            B C T H W, with the given frames in their slots.
        """
        conditional = self._branch(noisy, sigma, self.text_emb)
        if self.guidance:
            # Classifier-free guidance compares with a model that was given neither text nor frames.
            free = self._branch(noisy, sigma, self.negative_text_emb, without_frames=True)
            conditional = conditional + self.guidance * (conditional - free)
        return torch.where(self.mask.bool(), self.given, conditional)

    def _branch(
        self, noisy: torch.Tensor, sigma: torch.Tensor, text_emb: torch.Tensor, *, without_frames: bool = False
    ) -> torch.Tensor:
        sigma_B = sigma.to(noisy).expand(noisy.shape[0])
        scaled = network_input(self.edm, noisy, sigma_B, self.given, self.mask, self.augment_noise, self.augment_sigma)
        mask = self.mask
        if without_frames:
            # Zeros stand where frames were given: what a network is trained to see where they were dropped.
            scaled, mask = scaled.masked_fill(mask.bool(), 0.0), torch.zeros_like(mask)
        output = self.network(
            scaled,
            self.edm.c_noise(sigma_B),
            text_emb,
            fps=self.fps,
            condition_mask_B1THW=mask if self.video2world else None,
            actions_BTA=self.actions,
        )
        level = per_sample(sigma_B)
        return self.edm.c_skip(level) * noisy + self.edm.c_out(level) * output.float()
