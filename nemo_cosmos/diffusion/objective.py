"""The EDM objective: preconditioning, noise levels, uncertainty-weighted loss.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1; Cosmos
report (arXiv 2501.03575), section 5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Noise law and preconditioning."""

    sigma_data: float = 0.5
    """Standard deviation of the latents that the network sees; latents are normalised to it."""
    p_mean: float = 0.0
    """Mean of ln(sigma) in training."""
    p_std: float = 1.0
    """Standard deviation of ln(sigma) in training."""
    adjust_video_noise: bool = True
    """Multiply sigma by sqrt(latent frames), since neighbouring frames tell of each other."""

    def __post_init__(self) -> None:
        """Refuses a law without spread."""
        if self.sigma_data <= 0 or self.p_std <= 0:
            raise user_error(
                "sigma_data, p_std", (self.sigma_data, self.p_std), "positive numbers", "Correct the recipe."
            )

    def sigma_of(self, normal: torch.Tensor, num_latent_frames: int) -> torch.Tensor:
        """Turns standard normal draws into training noise levels.

        Args:
            normal: N(0, 1) draws, any shape.
            num_latent_frames: T of the latent.

        Returns:
            sigma > 0, same shape.
        """
        sigma = (self.p_mean + self.p_std * normal).exp()
        return sigma * math.sqrt(num_latent_frames) if self.adjust_video_noise else sigma

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the noisy input in the denoised output."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the network's output in the denoised output."""
        return sigma * self.sigma_data * (sigma**2 + self.sigma_data**2).rsqrt()

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        """Scale that gives the network's input unit variance."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """The network's time input."""
        return sigma.log() / 4

    def denoised(self, noisy: torch.Tensor, output: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean latent, B C T H W, from the noisy one and the network's output; float32."""
        sigma = per_sample(sigma_B)
        return self.c_skip(sigma) * noisy + self.c_out(sigma) * output.float()

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """w(sigma), which makes the network's own error weigh alike at every noise level."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


def per_sample(values_B: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1, 1], to meet latents B C T H W."""
    return values_B.view(-1, 1, 1, 1, 1)


def uncertainty_weighted_loss(
    denoised: torch.Tensor,
    clean: torch.Tensor,
    weight_B: torch.Tensor,
    logvar_B: torch.Tensor,
    free_B1THW: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(-u) w MSE + u for each sample, over the frames that are to be generated.

    Args:
        denoised: Prediction of the clean latent, B C T H W.
        clean: The clean latent, B C T H W.
        weight_B: w(sigma).
        logvar_B: u, the learned log-variance at this noise level.
        free_B1THW: 1 where the latent is to be generated, 0 where it was given; broadcast over H and W.

    Returns:
        The loss and the plain weighted error w MSE, both [B].

    Source:
        Cosmos report (arXiv 2501.03575), section 5.1; Kendall et al. 2018 for the uncertainty term.
    """
    squared = (denoised.float() - clean.float()).square() * free_B1THW
    counted = free_B1THW.expand(clean.shape).flatten(1).sum(1)
    error_B = weight_B * squared.flatten(1).sum(1) / counted
    return (-logvar_B).exp() * error_B + logvar_B, error_B
