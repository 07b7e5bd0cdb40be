"""Activation recomputation by Megatron's settings: `recompute_granularity`, `_method`, `_num_layers`, `_modules`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint


def run_recomputed(function: Callable[..., torch.Tensor], *args: Any, config: TransformerConfig) -> torch.Tensor:  # noqa: ANN401 - of `function`
    """Calls a function and keeps nothing but its arguments for the backward pass, which calls it again."""
    # Without dropout nothing random is drawn in a block, so there is no random state to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=config.attention_dropout > 0)


def recomputes_module(config: TransformerConfig, name: str) -> bool:
    """Whether selective recomputation covers a part of the block: `core_attn` or `mlp`."""
    return config.recompute_granularity == "selective" and name in config.recompute_modules


def run_blocks(
    blocks: Sequence[Callable[..., torch.Tensor]],
    hidden: torch.Tensor,
    *args: Any,  # noqa: ANN401 - of the blocks
    config: TransformerConfig,
) -> torch.Tensor:
    """Runs the blocks of a stage in turn.

    With full recomputation, `uniform` keeps one input for every `recompute_num_layers` blocks; `block` keeps that of
    each of the stage's first `recompute_num_layers` blocks, and all that the others need.

    Args:
        blocks: Called as `block(hidden, *args)`.
        hidden: Input of the first.
        *args: What every block reads.
        config: The settings.

    Returns:
        Output of the last.
    """

    def run(part: Sequence[Callable[..., torch.Tensor]], hidden: torch.Tensor) -> torch.Tensor:
        for block in part:
            hidden = block(hidden, *args)
        return hidden

    if config.recompute_granularity != "full" or not torch.is_grad_enabled():
        return run(blocks, hidden)
    if config.recompute_method == "uniform":
        size, recomputed = config.recompute_num_layers, len(blocks)
    else:
        size, recomputed = 1, min(config.recompute_num_layers, len(blocks))
    for start in range(0, recomputed, size):
        hidden = run_recomputed(run, blocks[start : min(start + size, recomputed)], hidden, config=config)
    return run(blocks[recomputed:], hidden)
