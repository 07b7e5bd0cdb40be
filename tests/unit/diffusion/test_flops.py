"""Counted operations against what torch counts while the network runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_cosmos.diffusion.config import diffusion_7b
from nemo_cosmos.diffusion.flops import forward_flops, training_flops
from nemo_cosmos.diffusion.model import CosmosDiT
from tests.unit.diffusion.tiny_run import TEXT_DIM, tiny_dit

BATCH, TEXT, SIZE = 2, 5, (3, 8, 6)


def inputs(actions: torch.Tensor | None) -> tuple[tuple, dict]:
    return (torch.randn(BATCH, 16, *SIZE), torch.randn(BATCH), torch.randn(BATCH, TEXT, TEXT_DIM)), {
        "fps": 24.0,
        "actions_BTA": actions,
    }


@pytest.mark.parametrize("action_dim", [None, 3])
def test_forward_and_backward_are_counted_as_torch_counts_them(one_rank: torch.device, action_dim: int | None) -> None:
    config = tiny_dit(action_dim=action_dim, action_frames_per_latent=2)
    model = CosmosDiT(config)
    given, named = inputs(None if action_dim is None else torch.randn(BATCH, SIZE[0], 2 * action_dim))
    counted = forward_flops(config, SIZE, text_length=TEXT, num_samples=BATCH)
    # Of the kernels for attention, torch counts the plain one's multiplications on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        output = model(*given, **named)
        head = model.logvar(given[1])
        assert torchs.get_total_flops() == counted
        (output.sum() + head.sum()).backward()
    # A backward pass is two forward passes, but for the gradients of inputs, which these layers are not asked for.
    width, tokens = config.hidden_size, math.prod(config.token_grid(SIZE))
    patches = tokens * config.patch_channels * config.patch_volume * width
    actions = 0 if action_dim is None else SIZE[0] * 2 * (2 * action_dim * 4 * width)
    skipped = 2 * BATCH * (patches + width**2 + actions + config.uncertainty_channels)
    assert torchs.get_total_flops() == training_flops(config, SIZE, text_length=TEXT, num_samples=BATCH) - skipped


def test_the_published_size_spends_about_six_operations_per_weight_and_token() -> None:
    """Of 7.2 billion weights, those of the adaptive norms act once per sample; attention comes on top."""
    config, size, tokens = diffusion_7b(), (8, 64, 80), 10_240
    attention = 3 * 4 * config.num_layers * tokens**2 * config.hidden_size
    rest = training_flops(config, size, text_length=512) - attention
    assert 6 * 6.0e9 < rest / tokens < 6 * 7.2e9
