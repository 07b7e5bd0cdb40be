"""Same weights, same inputs: our DiT and diffusers' give the same output and the same gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import CosmosTransformer3DModel

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import NOT_IN_DIFFUSERS, from_diffusers, to_diffusers

pytestmark = pytest.mark.usefixtures("torchvision_resize")

TOLERANCE = 2e-5
"""fp32 outputs of order one through two layers, in another order of summation."""

CASES = {
    "video": ({}, (2, 3, 8, 8), 24.0),
    "other fps": ({}, (2, 3, 8, 8), 10.0),
    "frames numbered": ({}, (2, 3, 8, 8), None),
    "image": ({}, (2, 1, 8, 8), None),
    "odd sizes": ({}, (1, 5, 6, 10), 30.0),
    "learnable positions": ({"extra_pos_embed": "learnable"}, (2, 3, 6, 10), 24.0),
    "condition mask": ({"concat_condition_mask": True}, (2, 3, 8, 8), 24.0),
    "14B rotary ratios, thin MLP": ({"rope_ratio": (2.0, 2.0, 2.0), "ffn_hidden_size": 144}, (1, 2, 4, 12), 16.0),
}


def tiny_config(**overrides) -> DiTConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 3,
        "adaln_lora_dim": 16,
        "crossattn_emb_channels": 20,
        "max_latent_size": (6, 16, 16),
        "extra_pos_embed": None,
        "rope_ratio": (2.0, 1.0, 1.0),
    }
    return DiTConfig(**{**sizes, **overrides})


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every weight a value, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


def diffusers_twin(model: CosmosDiT) -> CosmosTransformer3DModel:
    state, config = to_diffusers(model.state_dict(), model.config)
    twin = CosmosTransformer3DModel(**config)
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_diffusers(case: str, one_rank: torch.device) -> None:
    overrides, (batch, frames, height, width), fps = CASES[case]
    ours = randomized(CosmosDiT(tiny_config(**overrides)))
    theirs = diffusers_twin(ours)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, frames, height, width, generator=generator)
    timesteps = torch.randn(batch, generator=generator)
    text = torch.randn(batch, 7, 20, generator=generator)
    padding = torch.zeros(1, 1, height * 8, width * 8)
    padding[..., : width * 2] = 1
    condition = torch.zeros(batch, 1, frames, height, width)
    condition[:, :, 0] = 1
    condition = condition if overrides.get("concat_condition_mask") else None

    output = ours(x, timesteps, text, fps=fps, padding_mask_B1HW=padding, condition_mask_B1THW=condition)
    expected = theirs(x, timesteps, text, fps=fps, padding_mask=padding, condition_mask=condition, return_dict=False)[0]
    assert 0.1 < expected.std() < 2
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)

    weights = torch.randn(output.shape, generator=generator)
    (output * weights).mean().backward()
    (expected * weights).mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if name not in NOT_IN_DIFFUSERS}
    gradients = {**gradients, **{name: torch.zeros(1) for name in NOT_IN_DIFFUSERS}}
    moved, _ = to_diffusers(gradients, ours.config)
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-4, atol=float(2e-5 * scale), msg=name)


def test_round_trip_is_exact_and_fills_all_but_the_uncertainty_head(one_rank: torch.device) -> None:
    ours = randomized(CosmosDiT(tiny_config(extra_pos_embed="learnable")))
    state, _ = to_diffusers(ours.state_dict(), ours.config)
    back = from_diffusers(state, ours.config)
    kept = {name: w for name, w in ours.state_dict().items() if not name.endswith("_extra_state")}
    assert set(back) == set(kept) - set(NOT_IN_DIFFUSERS)
    assert all(torch.equal(back[name], kept[name]) for name in back)
