import pytest
import torch

from nemo_cosmos.diffusion.config import diffusion_7b, diffusion_14b, diffusion_tiny
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation.sampling import PUBLISHED, TINY, SamplingConfig


@pytest.mark.parametrize(
    ("size", "defaults"), [(diffusion_7b, PUBLISHED), (diffusion_14b, PUBLISHED), (diffusion_tiny, TINY)]
)
def test_each_size_has_its_own_defaults(size, defaults):
    config = SamplingConfig(seed=3).for_diffusion(size())
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.seed == 3


def test_published_sizes_sample_as_the_reference_does_unless_told_otherwise():
    config = SamplingConfig(guidance=0.0, num_frames=57).for_diffusion(diffusion_7b(), {"sigma_max": 70.0})
    assert (config.num_steps, config.sampler, config.height, config.width) == (36, "res_2ab", 704, 1280)
    assert (config.guidance, config.num_frames, config.sigma_max) == (0.0, 57, 70.0)
    # Levels at which RES of 35 steps calls the network, `get_rev_ts(0.002, 70, 35, 7)` of the reference, and the end.
    ramp = torch.arange(36, dtype=torch.float64) / 35
    levels = (70.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 70.0 ** (1 / 7))) ** 7
    torch.testing.assert_close(config.sigmas(), torch.cat([levels, torch.zeros(1)]).float())
    assert SamplingConfig(sigma_max=60.0).for_diffusion(diffusion_7b(), {"sigma_max": 70.0}).sigma_max == 60.0


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "magic"},
        {"guidance": -1.0},
        {"fps": 0.0},
        {"chunk_frames": 9, "overlap_frames": 9},
        {"chunk_frames": 9, "overlap_frames": 0},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values)).split("_")[0]):
        SamplingConfig(**values)


@pytest.mark.parametrize("values", [{"top_k": 5}, {"speculation": "none"}, {"compile": True}])
def test_a_diffusion_wfm_takes_nothing_that_concerns_tokens(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}.*draws no tokens"):
        SamplingConfig(**values).for_diffusion(diffusion_tiny())
