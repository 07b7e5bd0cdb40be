"""From noise to a latent: integrators of the EDM probability-flow ODE.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 and equation 5, for the noise levels, Euler's and Heun's
methods. The multistep methods name their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from tqdm import tqdm

from nemo_cosmos.errors import user_error

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latent B C T H W, sigma scalar) -> estimate of the clean latent."""


FinalSigma = Literal["zero", "sigma_min"]
"""Where a run ends: at the clean latent, or at the last noisy level; diffusers' `final_sigmas_type`."""


def karras_sigmas(
    num_steps: int,
    *,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    rho: float = 7.0,
    final_sigma: FinalSigma = "zero",
) -> torch.Tensor:
    """Noise levels of a sampling run.

    Args:
        num_steps: Number of denoising steps.
        sigma_max: First level.
        sigma_min: Last level before the clean end.
        rho: Curvature; larger values spend more steps at low noise.
        final_sigma: With "sigma_min" the run ends there. diffusers then has a last step from this level to itself,
            which changes nothing and is left out here.

    Returns:
        float32 [num_steps + 1], falling, the last one 0; [num_steps], without it, where the run ends at `sigma_min`.

    Raises:
        UserError: There would be no step, or the levels do not fall.
    """
    fewest = 1 if final_sigma == "zero" else 2
    if num_steps < fewest:
        raise user_error("num_steps", num_steps, f"at least {fewest}", "Ask for more steps.")
    if not 0 < sigma_min < sigma_max:
        raise user_error("sigma_min, sigma_max", (sigma_min, sigma_max), "0 < sigma_min < sigma_max", "Correct them.")
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return sigmas.float() if final_sigma == "sigma_min" else torch.cat([sigmas, torch.zeros(1)]).float()


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


def sample_res_2ab(
    denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, *, progress: bool = False
) -> torch.Tensor:
    """Refined exponential solver of second order by Adams and Bashforth, one network call per step.

    The solver of the reference, which counts its clean last step apart: its `num_steps` n are n + 1 here.

    Args and returns as `sample_euler`.

    Source: Zhang et al. 2023 (arXiv 2308.02157); `res_sampler.py` of NVIDIA cosmos-predict1, option `2ab`.
    """
    return _sample_multistep(denoise, noise, sigmas, lambda h: 1 - (1 - math.exp(-h)) / h, progress=progress)


def sample_dpmpp_2m(
    denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, *, progress: bool = False
) -> torch.Tensor:
    """DPM-Solver++(2M), the midpoint form, one network call per step.

    Args and returns as `sample_euler`.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """
    return _sample_multistep(denoise, noise, sigmas, lambda h: (1 - math.exp(-h)) / 2, progress=progress)


def _sample_multistep(
    denoise: Denoise,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    slope_weight: Callable[[float], float],
    *,
    progress: bool,
) -> torch.Tensor:
    """Exponential integrators of second order in lambda = -ln(sigma), along which the clean estimate changes slowly.

    Over a step h of lambda the estimate is taken as a line through this level's value and the last one's. Its constant
    part is integrated exactly; `slope_weight(h) * h` is the weight of its slope, in which the methods differ.
    """
    latent = noise * sigmas[0]
    before: tuple[torch.Tensor, float] | None = None  # the estimate at the level before, and the step from there
    steps = list(enumerate(pairwise(sigmas.tolist())))
    for index, (sigma, following) in tqdm(steps, desc="sampling", unit="step", disable=not progress):
        clean = denoise(latent, sigmas[index])
        if following == 0:
            return clean
        h, decay = math.log(sigma / following), following / sigma
        latent = decay * latent + (1 - decay) * clean
        if before is not None:
            last_clean, last_h = before
            latent = latent + slope_weight(h) * h / last_h * (clean - last_clean)
        before = clean, h
    return latent


SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "res_2ab": sample_res_2ab, "dpmpp_2m": sample_dpmpp_2m}
"""Samplers by name."""
