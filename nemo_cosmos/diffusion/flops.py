"""Floating-point operations of a DiT, counted from its sizes; a multiplication and an addition are two."""

from __future__ import annotations

import math

from nemo_cosmos.diffusion.config import DiTConfig


def forward_flops(
    config: DiTConfig, latent_size: tuple[int, int, int], *, text_length: int, num_samples: int = 1
) -> int:
    """Counts the matrix multiplications of a forward pass, as `torch.utils.flop_counter` does.

    Args:
        config: The network.
        latent_size: T, H, W of a latent.
        text_length: Text tokens of a sample.
        num_samples: Of that size.

    Returns:
        Operations of the whole network, over all ranks.
    """
    width, inner = config.hidden_size, config.adaln_lora_dim
    tokens = math.prod(config.token_grid(latent_size))
    # Where actions are taken, each latent frame has its own modulation.
    groups = latent_size[0] if config.action_dim is not None else 1
    adaln = groups * (width * inner + inner * 3 * width)
    self_attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    cross_attention = (
        tokens * 2 * width**2
        + text_length * config.crossattn_emb_channels * 2 * width
        + 2 * tokens * text_length * width
    )
    mlp = tokens * 2 * width * config.ffn_hidden_size
    block = self_attention + cross_attention + mlp + 3 * adaln
    ends = tokens * config.patch_volume * (config.patch_channels + config.out_channels) * width
    final_adaln = groups * (width * inner + inner * 2 * width)
    time = width**2 + width * 3 * width
    actions = 0
    if config.action_dim is not None:
        actions = groups * 4 * width * (2 * config.action_dim * config.action_frames_per_latent + width + 3 * width)
    per_sample = (
        config.num_layers * block + ends + final_adaln + time + actions + config.uncertainty_channels  # logvar
    )
    return 2 * num_samples * per_sample


def training_flops(
    config: DiTConfig, latent_size: tuple[int, int, int], *, text_length: int, num_samples: int = 1
) -> int:
    """Counts forward and backward pass by the usual rule: a backward pass is two forward passes.

    What recomputation adds is left out, as model-FLOPs utilisation wants it. Arguments and result as `forward_flops`.

    Source: Chowdhery et al. 2022, PaLM, https://arxiv.org/abs/2204.02311, appendix B.
    """
    return 3 * forward_flops(config, latent_size, text_length=text_length, num_samples=num_samples)
