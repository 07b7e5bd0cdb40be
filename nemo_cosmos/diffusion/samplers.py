"""From noise to a latent: integrators of the EDM probability-flow ODE.

Source: Karras et al. 2022, algorithm 1 and equation 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tqdm import tqdm

from nemo_cosmos.errors import user_error

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latent B C T H W, sigma scalar) -> estimate of the clean latent."""


def karras_sigmas(
    num_steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> torch.Tensor:
    """Noise levels of a sampling run.

    Args:
        num_steps: Number of denoising steps.
        sigma_max: First level.
        sigma_min: Last level before the clean end.
        rho: Curvature; larger values spend more steps at low noise.

    Returns:
        float32 [num_steps + 1], falling, the last one 0.

    Raises:
        UserError: `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise user_error("num_steps", num_steps, "at least 1", "Ask for more steps.")
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, torch.zeros(1)]).float()


def sample_euler(
    denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, *, progress: bool = False
) -> torch.Tensor:
    """First-order integration, one network call per step.

    Args:
        denoise: The denoiser.
        noise: N(0, 1), B C T H W.
        sigmas: Levels from `karras_sigmas`.
        progress: Show a progress bar.

    Returns:
        The sampled latent, B C T H W.
    """
    latent = noise * sigmas[0]
    steps = list(zip(sigmas[:-1], sigmas[1:], strict=True))
    for sigma, following in tqdm(steps, desc="sampling", unit="step", disable=not progress):
        slope = (latent - denoise(latent, sigma)) / sigma
        latent = latent + (following - sigma) * slope
    return latent


def sample_heun(denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, *, progress: bool = False) -> torch.Tensor:
    """Second-order integration, two network calls per step but for the last.

    Args and returns as `sample_euler`.
    """
    latent = noise * sigmas[0]
    steps = list(zip(sigmas[:-1], sigmas[1:], strict=True))
    for sigma, following in tqdm(steps, desc="sampling", unit="step", disable=not progress):
        slope = (latent - denoise(latent, sigma)) / sigma
        predicted = latent + (following - sigma) * slope
        if following > 0:
            end_slope = (predicted - denoise(predicted, following)) / following
            predicted = latent + (following - sigma) * (slope + end_slope) / 2
        latent = predicted
    return latent


SAMPLERS = {"euler": sample_euler, "heun": sample_heun}
"""Samplers by name."""
