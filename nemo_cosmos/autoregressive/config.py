"""Configuration of the Cosmos autoregressive transformer, its published sizes, and the check of a parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import BackendName
from nemo_cosmos.parallel.tokens import causal_unit
from nemo_cosmos.transformer.layout import (
    check_groups,
    check_positive,
    check_recomputation,
    fit_interleaved_pipeline,
    leave_uninitialized,
    nearest_divisors,
    nearest_multiples,
)
from nemo_cosmos.transformer.positions import Grid

NUM_SPECIAL_TOKENS = 3
"""Begin, end and padding of a video: the three codes after those of the tokenizer, where a model has them."""


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Rotary frequencies for grids larger than those that a model was first trained on.

    Of an axis whose grid had n places, frequencies below 2 pi `beta_slow` / n are divided by `scale`, those above
    2 pi `beta_fast` / n stay, and between them the divisor changes linearly. As in the published code, rows and columns
    change by the same rule as time, by the number of rows both, and attention is not sharpened by YaRN's factor
    0.1 ln(scale) + 1, which that code computes and does not use.

    Source: Peng et al., YaRN, https://arxiv.org/abs/2309.00071, 3.2; Cosmos, https://arxiv.org/abs/2501.03575, 5.2.2.
    """

    original_grid: Grid = (3, 40, 64)
    """Grid of the first training."""
    scale: float = 2.0
    """How much longer sequences become."""
    beta_fast: float = 4.0
    """Turns over the original axis above which a frequency stays."""
    beta_slow: float = 1.0
    """Turns over it below which a frequency is divided."""


@dataclass(kw_only=True)
class ARConfig(TransformerConfig):
    """A Cosmos autoregressive transformer; the fields of Megatron's configuration are set to what this model is.

    Source: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 5.2.
    """

    vocab_size: int = 64_000
    """Codes of the tokenizer; the classes that are predicted."""
    special_tokens: bool = False
    """Whether begin, end and padding of a video have embeddings too, after the codes; then every video begins by one.
    None of them is ever predicted."""
    make_vocab_size_divisible_by: int = 64
    """Vocabularies are padded to a multiple of this; it must divide by the tensor-parallel size."""
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer is the embedding transposed."""
    rotary_base: float = 500_000.0
    """Theta of the rotary positions."""
    yarn: Yarn | None = None
    """How rotary positions were extended; None where they were not."""
    extra_pos_embed: Literal["sincos"] | None = None
    """Positions added at the input of every layer, besides the rotary ones."""
    crossattn_emb_channels: int | None = None
    """Width of a text token; None for a model without text."""
    num_medusa_heads: int = 0
    """Heads that guess the tokens after the next one (`medusa.py`); they change none of the model's own predictions."""
    action_dim: int | None = None
    """Width of an action, which becomes a token beside those of the text; None for a model without actions."""
    init_seed: int = 1234
    """Weights depend on this and on their name alone, never on the parallel layout."""
    backend: BackendName = "auto"
    """Implementation of linear layers, norms and attention."""

    # Megatron's own fields, with the values that this model has.
    qk_layernorm: bool = True
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    gated_linear_unit: bool = True
    activation_func: Callable[[torch.Tensor], torch.Tensor] = functional.silu
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    use_cpu_initialization: bool = True
    init_method: Callable[[torch.Tensor], torch.Tensor] | None = None
    output_layer_init_method: Callable[[torch.Tensor], torch.Tensor] | None = None
    pipeline_dtype: torch.dtype | None = None
    variable_seq_lengths: bool = True
    """Images have fewer tokens than videos, and videos with special tokens a few more than the data say."""
    moe_token_dispatcher_type: str = "alltoall"  # Megatron asks this of variable lengths, also without experts.

    def __post_init__(self) -> None:
        """Fills what follows from other fields and refuses what the model cannot be.

        Raises:
            UserError: A size does not fit.
        """
        self._check_heads()
        self.init_method = self.init_method or leave_uninitialized
        self.output_layer_init_method = self.output_layer_init_method or leave_uninitialized
        self.pipeline_dtype = self.pipeline_dtype or self.params_dtype
        fit_interleaved_pipeline(self)
        super().__post_init__()
        self._check_sizes()
        check_recomputation(self)

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads <= 0 or self.hidden_size <= 0 or (self.kv_channels is None and self.hidden_size % heads):
            raise user_error(
                "hidden_size",
                (self.hidden_size, heads),
                "a positive multiple of num_attention_heads",
                "Correct it, or set kv_channels.",
            )
        if groups is not None and (groups <= 0 or heads % groups):
            raise user_error("num_query_groups", groups, f"a divisor of the {heads} heads", "Choose another number.")

    def _check_sizes(self) -> None:
        if self.kv_channels % 2 or self.kv_channels < 18:
            raise user_error(
                "channels per head", self.kv_channels, "even, 18 or more", "Rotary positions split them in three."
            )
        if self.vocab_size < 2 or self.make_vocab_size_divisible_by < 1:
            got = (self.vocab_size, self.make_vocab_size_divisible_by)
            raise user_error("vocab_size, make_vocab_size_divisible_by", got, "2 or more, and 1 or more", "Correct it.")
        if self.share_embeddings_and_output_weights and self.num_embeddings != self.num_outputs:
            raise user_error(
                "share_embeddings_and_output_weights",
                True,
                f"as many embeddings ({self.num_embeddings}) as outputs ({self.num_outputs})",
                "Leave special_tokens out, or raise make_vocab_size_divisible_by so that padding holds them.",
            )
        if self.num_medusa_heads < 0:
            raise user_error("num_medusa_heads", self.num_medusa_heads, "0 or more", "The published models have 9.")
        if self.extra_pos_embed not in ("sincos", None):
            raise user_error("extra_pos_embed", self.extra_pos_embed, "'sincos' or None", "Choose one of these.")
        if self.action_dim is not None and (self.action_dim < 1 or self.crossattn_emb_channels is None):
            raise user_error(
                "action_dim",
                self.action_dim,
                "positive, and crossattn_emb_channels set",
                "Start from a model with text.",
            )
        if self.extra_pos_embed and self.hidden_size % 2:
            raise user_error("hidden_size", self.hidden_size, "even, with extra_pos_embed", "Choose another.")

    @property
    def num_embeddings(self) -> int:
        """Rows of the token embedding, padding included; 64,064 in the published models with text."""
        return self._padded(self.vocab_size + (NUM_SPECIAL_TOKENS if self.special_tokens else 0))

    @property
    def num_outputs(self) -> int:
        """Rows of the output layer, padding included."""
        return self._padded(self.vocab_size)

    def _padded(self, size: int) -> int:
        unit = self.make_vocab_size_divisible_by
        return -(-size // unit) * unit

    @property
    def begin_of_video(self) -> int:
        """Token before every video, where there are special ones."""
        return self.vocab_size

    @property
    def padding(self) -> int:
        """Token after the video's last one, where there are special ones."""
        return self.vocab_size + 2

    @property
    def num_first(self) -> int:
        """Tokens that stand before the video's own."""
        return int(self.special_tokens)


def _published(**sizes: Any) -> dict[str, Any]:  # noqa: ANN401 - any field
    shared = {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "ffn_hidden_size": 14_336}
    return {**shared, **sizes}


_WITH_TEXT = {"special_tokens": True, "extra_pos_embed": "sincos", "crossattn_emb_channels": 1024}


def autoregressive_4b(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """The published 4B: 4,014,088,192 parameters."""
    return ARConfig(**{**_published(num_layers=16, hidden_size=4096), **overrides})


def autoregressive_5b(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """The published 5B, the 4B with text: 4,584,845,312 parameters."""
    return autoregressive_4b(**{**_WITH_TEXT, **overrides})


def autoregressive_12b(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """The published 12B: 11,560,975,360 parameters."""
    return ARConfig(**{**_published(num_layers=40, hidden_size=5120, yarn=Yarn()), **overrides})


def autoregressive_13b(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """The published 13B, the 12B with text: 13,323,125,760 parameters."""
    return autoregressive_12b(**{**_WITH_TEXT, **overrides})


def autoregressive_tiny(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """A transformer that trains on a CPU in minutes, for the 4,096 codes of DV8x8x8-tiny: 5,640,192 parameters."""
    sizes = {
        "num_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 512,
        "vocab_size": 4096,
    }
    return ARConfig(**{**sizes, **overrides})


def autoregressive_tiny_video2world(**overrides: Any) -> ARConfig:  # noqa: ANN401 - any field
    """The tiny transformer with text, by the tiny text encoder; what the 5B is to the 4B."""
    return autoregressive_tiny(**{**_WITH_TEXT, "crossattn_emb_channels": 384, **overrides})


PRESETS = {
    "autoregressive_4b": autoregressive_4b,
    "autoregressive_5b": autoregressive_5b,
    "autoregressive_12b": autoregressive_12b,
    "autoregressive_13b": autoregressive_13b,
    "autoregressive_tiny": autoregressive_tiny,
    "autoregressive_tiny_video2world": autoregressive_tiny_video2world,
}
"""Configurations by name."""


def check_layout(config: ARConfig, tp: int, pp: int, cp: int, num_tokens: int | None = None) -> None:
    """Refuses a parallel layout that this model cannot be cut into.

    Args:
        config: The model; `sequence_parallel`, `cp_comm_type`, `variable_seq_lengths` and
            `virtual_pipeline_model_parallel_size` are read.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        cp: Context-parallel size.
        num_tokens: Tokens of one sample, special ones included, where known.

    Raises:
        UserError: With the reason and the nearest values that would do.
    """
    check_positive(tp, pp, cp)
    shared = (config.num_query_groups, config.ffn_hidden_size, config.num_embeddings, config.num_outputs)
    if any(size % tp for size in shared):
        raise user_error(
            "tensor-parallel size",
            tp,
            f"a divisor of the {shared[0]} key heads, of ffn_hidden_size {shared[1]} and of the padded vocabularies "
            f"{shared[2]} and {shared[3]}",
            f"Nearest: {nearest_divisors(tp, *shared)}.",
        )
    check_groups(config, tp, pp, cp)
    if config.action_dim is not None and pp > 1:
        raise user_error(
            "pipeline-parallel size",
            pp,
            "1 with action_dim",
            "Use tensor-parallel ranks; every stage reads the actions.",
        )
    unit = causal_unit(cp, tp if config.sequence_parallel else 1)
    if num_tokens is not None and num_tokens % unit:
        raise user_error(
            "tokens of a sample",
            num_tokens,
            f"a multiple of {unit}, for context-parallel ranks hold two chunks of it each"
            + (", which sequence parallelism cuts once more" if config.sequence_parallel else ""),
            f"Nearest: {nearest_multiples(num_tokens, unit)}.",
        )
