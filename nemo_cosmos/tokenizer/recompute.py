"""Activation checkpointing: blocks keep their inputs only, and are run again for the backward pass."""

from __future__ import annotations

import functools

from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.image_layers import ImageAttention, ImageDownsample, ImageResnetBlock, ImageUpsample
from nemo_cosmos.tokenizer.layers import CausalAttention, HybridDownsample, HybridUpsample, ResnetBlock
from nemo_cosmos.tokenizer.model import Tokenizer

_UNITS = (
    *(ResnetBlock, CausalAttention, HybridDownsample, HybridUpsample),
    *(ImageResnetBlock, ImageAttention, ImageDownsample, ImageUpsample),
)


def recompute_activations(tokenizer: Tokenizer, config: TransformerConfig) -> None:
    """Makes every residual, attention and resampling block run again in the backward pass, as Megatron's config says.

    Args:
        tokenizer: Changed in place; weights and their names stay.
        config: `recompute_granularity="full"` with `recompute_method="uniform"` and `recompute_num_layers=1`, or None
            for all three, which keeps all activations.

    Raises:
        UserError: Another kind of recomputation is asked for; the others divide a transformer's layers.
    """
    if config.recompute_granularity is None:
        return
    wanted = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
    if wanted != ("full", "uniform", 1):
        raise user_error("recompute_granularity, _method, _num_layers", wanted, "full, uniform, 1", "Set these.")
    for block in tokenizer.modules():
        if isinstance(block, _UNITS):
            # There is no dropout, hence no random state to be kept.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
