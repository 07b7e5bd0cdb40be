"""Same weights, same inputs: our DiT and diffusers' give the same output and the same gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
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
    "another ratio on each axis": ({"rope_ratio": (1.5, 3.0, 2.0)}, (1, 3, 6, 8), 12.0),
    "no padding mask": ({"concat_padding_mask": False}, (1, 2, 4, 6), 24.0),
    "given image, learnable positions": (
        {"concat_condition_mask": True, "extra_pos_embed": "learnable"},
        (3, 1, 6, 4),
        None,
    ),
    "fixed positions": ({"extra_pos_embed": "sincos"}, (2, 3, 6, 10), 24.0),
    "heads of 128, enough tokens for oneDNN": ({"hidden_size": 128, "num_attention_heads": 1}, (1, 4, 16, 16), 24.0),
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


class PublishedFixedPositions(torch.nn.Module):
    """As the published multi-view model writes its tables; diffusers has only learned ones."""

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        frames, height, width = x_BCTHW.shape[2], x_BCTHW.shape[3] // 2, x_BCTHW.shape[4] // 2
        over_t, over_h, over_w = self.table(frames, 24), self.table(height, 24), self.table(width, 24)
        rows = [
            torch.cat([over_t[t], over_h[h], over_w[w]])
            for t in range(frames)
            for h in range(height)
            for w in range(width)
        ]
        return torch.stack(rows)[None]

    def table(self, length: int, channels: int) -> torch.Tensor:
        omega = 1 / 10000 ** (np.arange(channels // 2) / (channels / 2))
        angles = np.arange(length)[:, None] * omega
        return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def without_fixed_positions(config: DiTConfig) -> DiTConfig:
    return dataclasses.replace(config, extra_pos_embed=None) if config.extra_pos_embed == "sincos" else config


def diffusers_twin(model: CosmosDiT) -> CosmosTransformer3DModel:
    state, config = to_diffusers(model.state_dict(), without_fixed_positions(model.config))
    if model.config.extra_pos_embed == "sincos":
        twin = CosmosTransformer3DModel(**{**config, "extra_pos_embed_type": "learnable"})
        twin.learnable_pos_embed = PublishedFixedPositions()
    else:
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
    padding = padding if ours.config.concat_padding_mask else None
    condition = torch.zeros(batch, 1, frames, height, width)
    condition[:1, :, 0] = 1
    condition = condition if ours.config.concat_condition_mask else None

    own, given = ([tensor.clone().requires_grad_() for tensor in (x, text)] for _ in range(2))
    output = ours(own[0], timesteps, own[1], fps=fps, padding_mask_B1HW=padding, condition_mask_B1THW=condition)
    masks = {"padding_mask": padding, "condition_mask": condition}
    expected = theirs(given[0], timesteps, given[1], fps=fps, **masks, return_dict=False)[0]
    assert 0.1 < expected.std() < 2
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)

    weights = torch.randn(output.shape, generator=generator)
    (output * weights).mean().backward()
    (expected * weights).mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if name not in NOT_IN_DIFFUSERS}
    gradients = {**gradients, **{name: torch.zeros(1) for name in NOT_IN_DIFFUSERS}}
    moved, _ = to_diffusers(gradients, without_fixed_positions(ours.config))
    pairs = {name: (moved[name], parameter.grad) for name, parameter in theirs.named_parameters()}
    pairs |= {"latent": (own[0].grad, given[0].grad), "text": (own[1].grad, given[1].grad)}
    for name, (gradient, wanted) in pairs.items():
        scale = wanted.abs().max()
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=float(2e-5 * scale), msg=name)


def test_round_trip_is_exact_and_fills_all_but_the_uncertainty_head(one_rank: torch.device) -> None:
    ours = randomized(CosmosDiT(tiny_config(extra_pos_embed="learnable")))
    state, _ = to_diffusers(ours.state_dict(), ours.config)
    back = from_diffusers(state, ours.config)
    kept = {name: w for name, w in ours.state_dict().items() if not name.endswith("_extra_state")}
    assert set(back) == set(kept) - set(NOT_IN_DIFFUSERS)
    assert all(torch.equal(back[name], kept[name]) for name in back)
