import math

import pytest
import torch

from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS, karras_sigmas, sample_dpmpp_2m, sample_euler, sample_res_2ab
from nemo_cosmos.errors import UserError


def _gaussian_denoiser(mean: float, std: float):
    """The exact denoiser of data drawn from N(mean, std^2)."""

    def denoise(x, sigma):
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    return denoise


def _diffusers_sample(scheduler, denoise, noise, num_steps):
    scheduler.set_timesteps(num_steps)
    latent, edm = noise * 80, EDM()
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        network_output = (denoise(latent, sigma) - edm.c_skip(sigma) * latent) / edm.c_out(sigma)
        latent = scheduler.step(network_output, t, latent).prev_sample
    return latent


@pytest.mark.parametrize("num_steps", [3, 12, 20])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_trajectories_end_where_those_of_diffusers_do(name, num_steps):
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    theirs, ours = {
        "euler": (EDMEulerScheduler, sample_euler),
        "dpmpp_2m": (EDMDPMSolverMultistepScheduler, sample_dpmpp_2m),
    }[name]
    denoise = _gaussian_denoiser(0.3, 0.5)
    noise = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler = theirs(sigma_min=0.002, sigma_max=80, sigma_data=0.5, prediction_type="epsilon")
    expected = _diffusers_sample(scheduler, denoise, noise, num_steps)
    torch.testing.assert_close(ours(denoise, noise, karras_sigmas(num_steps)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_levels_are_those_of_diffusers_but_for_its_step_of_no_length(final):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=70, final_sigmas_type=final)
    scheduler.set_timesteps(9)
    expected = scheduler.sigmas if final == "zero" else scheduler.sigmas[:-1]
    ours = karras_sigmas(9, sigma_min=0.01, sigma_max=70, final_sigma=final)
    assert torch.equal(ours, expected)


def _reference_res_2ab(denoise, noise, sigmas):
    """As the reference writes it: phi functions of the step, and nodes relative to it (`runge_kutta.py`)."""
    latent, before = noise * sigmas[0], None
    for sigma, following in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        clean = denoise(latent, sigma)
        s, t = -torch.log(sigma), -torch.log(following)
        dt = t - s
        if before is None:
            latent = (sigma - following) / sigma * clean + following / sigma * latent
        else:
            last_clean, last_sigma = before
            phi1 = torch.expm1(-dt) / -dt
            phi2 = (phi1 - 1) / -dt
            c2 = (-torch.log(last_sigma) - s) / dt
            latent = torch.exp(-dt) * latent + dt * ((phi1 - phi2 / c2) * clean + phi2 / c2 * last_clean)
        before = clean, sigma
    return denoise(latent, sigmas[-2])


def test_res_is_the_solver_of_the_reference():
    denoise = _gaussian_denoiser(0.3, 0.5)
    noise = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = karras_sigmas(13).double()
    expected = _reference_res_2ab(denoise, noise, sigmas)
    torch.testing.assert_close(sample_res_2ab(denoise, noise, sigmas), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samples_have_the_distribution_of_the_data(name):
    noise = torch.randn(1, 1, 1, 200, 200, generator=torch.Generator().manual_seed(1))
    sample = SAMPLERS[name](_gaussian_denoiser(0.3, 0.5), noise, karras_sigmas(100))
    assert abs(sample.mean() - 0.3) < 0.02
    assert abs(sample.std() - 0.5) < 0.02


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("res_2ab", 2), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_method(name, order):
    mean, std = 0.3, 0.5
    denoise = _gaussian_denoiser(mean, std)
    noise = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def error(num_steps):
        first, *_, last, _ = karras_sigmas(num_steps).double()
        spread = ((std**2 + last**2) / (std**2 + first**2)).sqrt()
        # All methods end with the denoiser's word at the last level, so the exact solution does too.
        exact = denoise(mean + (noise * first - mean) * spread, last)
        return (SAMPLERS[name](denoise, noise, karras_sigmas(num_steps)) - exact).abs().max().item()

    observed = math.log2(error(128) / error(256))
    assert observed == pytest.approx(order, abs=0.2)


def test_no_steps_and_rising_levels_are_refused():
    with pytest.raises(UserError, match="num_steps: got 0"):
        karras_sigmas(0)
    with pytest.raises(UserError, match="num_steps: got 1"):
        karras_sigmas(1, final_sigma="sigma_min")
    with pytest.raises(UserError, match="sigma_min, sigma_max"):
        karras_sigmas(4, sigma_max=0.001)
