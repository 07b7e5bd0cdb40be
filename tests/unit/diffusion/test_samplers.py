import pytest
import torch

from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS, karras_sigmas, sample_euler
from nemo_cosmos.errors import UserError


def _gaussian_denoiser(mean: float, std: float):
    """The exact denoiser of data drawn from N(mean, std^2)."""

    def denoise(x, sigma):
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    return denoise


def test_euler_follows_the_diffusers_trajectory():
    from diffusers import EDMEulerScheduler

    denoise = _gaussian_denoiser(0.3, 0.5)
    noise = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, prediction_type="epsilon")
    scheduler.set_timesteps(12)
    latent, edm = noise * 80, EDM()
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        network_output = (denoise(latent, sigma) - edm.c_skip(sigma) * latent) / edm.c_out(sigma)
        latent = scheduler.step(network_output, t, latent).prev_sample
    ours = sample_euler(denoise, noise, karras_sigmas(12))
    torch.testing.assert_close(ours, latent, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samples_have_the_distribution_of_the_data(name):
    noise = torch.randn(1, 1, 1, 200, 200, generator=torch.Generator().manual_seed(1))
    sample = SAMPLERS[name](_gaussian_denoiser(0.3, 0.5), noise, karras_sigmas(100))
    assert abs(sample.mean() - 0.3) < 0.02
    assert abs(sample.std() - 0.5) < 0.02


def test_heun_is_nearer_the_exact_solution_than_euler():
    noise = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    exact = 0.3 + 0.5 * (noise * 80 - 0.3) / (80**2 + 0.5**2) ** 0.5
    error = {
        n: (f(_gaussian_denoiser(0.3, 0.5), noise, karras_sigmas(40)) - exact).abs().max() for n, f in SAMPLERS.items()
    }
    assert error["heun"] < error["euler"] / 4


def test_no_steps_is_refused():
    with pytest.raises(UserError, match="num_steps"):
        karras_sigmas(0)
