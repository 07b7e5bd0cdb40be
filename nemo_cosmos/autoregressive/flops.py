"""Floating-point operations of the autoregressive transformer; a multiplication and an addition are two."""

from __future__ import annotations

from nemo_cosmos.autoregressive.config import ARConfig


def forward_flops(config: ARConfig, num_tokens: int, *, text_length: int = 0, num_samples: int = 1) -> int:
    """Counts the matrix multiplications of a forward pass over whole sequences.

    Of attention's pairs of tokens the half that a causal mask leaves is counted, as FlashAttention counts.

    Args:
        config: The network.
        num_tokens: Of a sample, special ones included.
        text_length: Text tokens of a sample.
        num_samples: Of that length.

    Returns:
        Operations of the whole network, over all ranks.
    """
    width = config.hidden_size
    queries, keys = (heads * config.kv_channels for heads in (config.num_attention_heads, config.num_query_groups))
    projections = width * (2 * queries + 2 * keys)
    attention = num_tokens * projections + num_tokens**2 * queries
    mlp = num_tokens * 3 * width * config.ffn_hidden_size
    text = 0
    if config.crossattn_emb_channels is not None:
        text = (
            num_tokens * 2 * width * queries
            + text_length * config.crossattn_emb_channels * 2 * keys
            + 2 * num_tokens * text_length * queries
        )
    output = num_tokens * width * config.num_outputs
    return 2 * num_samples * (config.num_layers * (attention + text + mlp) + output)


def training_flops(config: ARConfig, num_tokens: int, *, text_length: int = 0, num_samples: int = 1) -> int:
    """Counts forward and backward pass by the usual rule: a backward pass is two forward passes.

    What recomputation adds is left out, as model-FLOPs utilisation wants it. Arguments and result as `forward_flops`.

    Source: Chowdhery et al. 2022, PaLM, https://arxiv.org/abs/2204.02311, appendix B.
    """
    return 3 * forward_flops(config, num_tokens, text_length=text_length, num_samples=num_samples)
