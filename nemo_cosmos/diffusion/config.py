"""Configuration of the Cosmos DiT, its published sizes, and the check of a parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.activation import gelu
from nemo_cosmos.parallel.backend import BackendName
from nemo_cosmos.transformer.layout import (
    check_groups,
    check_positive,
    check_recomputation,
    fit_interleaved_pipeline,
    leave_uninitialized,
    nearest_divisors,
    nearest_multiples,
)


@dataclass(kw_only=True)
class DiTConfig(TransformerConfig):
    """A Cosmos diffusion transformer; the fields of Megatron's configuration are set to what this model is.

    Source: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 5.1.
    """

    in_channels: int = 16
    """Channels of the latent."""
    out_channels: int = 16
    """Channels predicted."""
    concat_condition_mask: bool = False
    """Whether a channel tells which frames are given (Video2World)."""
    concat_padding_mask: bool = True
    """Whether a channel tells which pixels are padding."""
    patch_temporal: int = 1
    """Latent frames per token."""
    patch_spatial: int = 2
    """Latent rows, and columns, per token."""
    max_latent_size: tuple[int, int, int] = (128, 240, 240)
    """Largest latent grid T, H, W that positions exist for."""
    extra_pos_embed: Literal["learnable", "sincos"] | None = "learnable"
    """Positions added at the input of every block, besides the rotary ones; the multi-view models have fixed ones."""
    rope_ratio: tuple[float, float, float] = (2.0, 1.0, 1.0)
    """NTK extrapolation ratio of the rotary positions along T, H, W."""
    base_fps: float = 24.0
    """Frames per second at which the temporal rotary index is the frame's number."""
    crossattn_emb_channels: int = 1024
    """Width of a text token."""
    adaln_lora_dim: int = 256
    """Inner width of a block's adaptive-norm layers."""
    action_dim: int | None = None
    """Numbers per frame in an action; None for a model without action conditioning."""
    action_frames_per_latent: int = 8
    """Frames whose actions one latent frame is given (the tokenizer's temporal compression)."""
    uncertainty_channels: int = 128
    """Fourier features of the head that predicts the log-variance of the loss."""
    init_qk_norm: float = 1.0
    """First weight of the norms of self-attention's queries and keys; above 1, attention starts less even, which narrow
    heads take long to learn."""
    init_seed: int = 1234
    """Weights depend on this and on their name alone, never on the parallel layout."""
    backend: BackendName = "auto"
    """Implementation of linear layers, norms and attention."""

    # Megatron's own fields, with the values that this model has.
    qk_layernorm: bool = True
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    activation_func: Callable[[torch.Tensor], torch.Tensor] = gelu
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    use_cpu_initialization: bool = True
    init_method: Callable[[torch.Tensor], torch.Tensor] | None = None
    output_layer_init_method: Callable[[torch.Tensor], torch.Tensor] | None = None
    pipeline_dtype: torch.dtype | None = None
    variable_seq_lengths: bool = True
    """More rows than tokens cross between pipeline stages (see `stage_input.py`), and images have fewer than videos."""
    moe_token_dispatcher_type: str = "alltoall"  # Megatron asks this of variable lengths, also without experts.

    def __post_init__(self) -> None:
        """Fills what follows from other fields and refuses what the model cannot be.

        Raises:
            UserError: A size does not fit.
        """
        if self.num_attention_heads <= 0 or self.hidden_size <= 0 or self.hidden_size % self.num_attention_heads:
            raise user_error(
                "hidden_size",
                (self.hidden_size, self.num_attention_heads),
                "a positive multiple of num_attention_heads",
                f"Nearest: {nearest_multiples(self.hidden_size, max(self.num_attention_heads, 1))}.",
            )
        self.init_method = self.init_method or leave_uninitialized
        self.output_layer_init_method = self.output_layer_init_method or leave_uninitialized
        self.pipeline_dtype = self.pipeline_dtype or self.params_dtype
        fit_interleaved_pipeline(self)
        if self.variable_seq_lengths:
            # Megatron refuses its default with them, although this model has no experts to dispatch to.
            self.moe_token_dispatcher_type = "alltoall"
        super().__post_init__()
        self._check_sizes()
        check_recomputation(self)

    def _check_sizes(self) -> None:
        if self.kv_channels % 2 or self.kv_channels < 18:
            raise user_error(
                "channels per head", self.kv_channels, "even, 18 or more", "Rotary positions split them in three."
            )
        if self.num_query_groups != self.num_attention_heads:
            raise user_error(
                "num_query_groups", self.num_query_groups, "num_attention_heads", "This model shares no keys."
            )
        if self.patch_temporal < 1 or self.patch_spatial < 1 or min(self.max_latent_size) < 1:
            sizes = (self.patch_temporal, self.patch_spatial, self.max_latent_size)
            raise user_error("patch sizes and max_latent_size", sizes, "positive numbers", "Correct the configuration.")
        if self.extra_pos_embed not in ("learnable", "sincos", None):
            raise user_error(
                "extra_pos_embed", self.extra_pos_embed, "'learnable', 'sincos' or None", "Choose one of these."
            )
        if self.action_dim is not None and (self.action_dim < 1 or self.patch_temporal != 1):
            got = (self.action_dim, self.patch_temporal)
            raise user_error(
                "action_dim, patch_temporal", got, "1 or more, and 1", "One action goes to one latent frame."
            )

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent T, H, W per token."""
        return (self.patch_temporal, self.patch_spatial, self.patch_spatial)

    @property
    def patch_channels(self) -> int:
        """Channels that enter the patch embedding, masks included."""
        return self.in_channels + int(self.concat_condition_mask) + int(self.concat_padding_mask)

    @property
    def patch_volume(self) -> int:
        """Latent positions per token."""
        return self.patch_temporal * self.patch_spatial**2

    def token_grid(self, latent_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns tokens along T, H, W of a latent T, H, W.

        Raises:
            UserError: The latent does not divide into patches, or is larger than `max_latent_size`.
        """
        if any(size % patch or size < patch for size, patch in zip(latent_size, self.patch_size, strict=True)):
            raise user_error(
                "latent size T, H, W",
                latent_size,
                f"multiples of the patch {self.patch_size}",
                "Crop or pad the video.",
            )
        if any(size > most for size, most in zip(latent_size, self.max_latent_size, strict=True)):
            raise user_error(
                "latent size T, H, W",
                latent_size,
                f"at most {self.max_latent_size}",
                "Use a smaller video or a model with a larger max_latent_size.",
            )
        frames, height, width = (size // patch for size, patch in zip(latent_size, self.patch_size, strict=True))
        return frames, height, width


SIZES_7B: dict[str, Any] = {"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32}
SIZES_TINY: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "adaln_lora_dim": 32,
    "crossattn_emb_channels": 384,
    "extra_pos_embed": None,
    "init_qk_norm": 2.0,
}
"""What a diffusion decoder has in common with the WFM that it starts from."""


def diffusion_7b(**overrides: Any) -> DiTConfig:  # noqa: ANN401 - any field
    """The published 7B: 7,236,192,256 parameters and the uncertainty head of 128."""
    return DiTConfig(**{**SIZES_7B, **overrides})


def diffusion_14b(**overrides: Any) -> DiTConfig:  # noqa: ANN401 - any field
    """The published 14B: 14,267,149,312 parameters and the uncertainty head of 128."""
    sizes = {"num_layers": 36, "hidden_size": 5120, "num_attention_heads": 40, "rope_ratio": (2.0, 2.0, 2.0)}
    return DiTConfig(**{**sizes, **overrides})


def diffusion_tiny(**overrides: Any) -> DiTConfig:  # noqa: ANN401 - any field
    """A DiT that trains on a CPU in minutes; the same class as the published sizes."""
    return DiTConfig(**{**SIZES_TINY, "concat_condition_mask": True, **overrides})


PRESETS = {"diffusion_7b": diffusion_7b, "diffusion_14b": diffusion_14b, "diffusion_tiny": diffusion_tiny}
"""Configurations by name."""


def check_layout(config: DiTConfig, tp: int, pp: int, cp: int, num_tokens: int | None = None) -> None:
    """Refuses a parallel layout that this model cannot be cut into.

    Args:
        config: The model; `sequence_parallel`, `cp_comm_type`, `variable_seq_lengths` and
            `virtual_pipeline_model_parallel_size` are read.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        cp: Context-parallel size.
        num_tokens: Tokens of one sample, where known.

    Raises:
        UserError: With the reason and the nearest values that would do.
    """
    check_positive(tp, pp, cp)
    if config.num_attention_heads % tp or config.ffn_hidden_size % tp:
        raise user_error(
            "tensor-parallel size",
            tp,
            f"a divisor of the {config.num_attention_heads} heads and of ffn_hidden_size {config.ffn_hidden_size}",
            f"Nearest: {nearest_divisors(tp, config.num_attention_heads, config.ffn_hidden_size)}.",
        )
    check_groups(config, tp, pp, cp)
    if pp > 1 and not config.variable_seq_lengths:
        raise user_error(
            "variable_seq_lengths",
            False,
            "True where the model is cut into pipeline stages, for more crosses than a sample has tokens",
            "Leave it as it is by default.",
        )
    parts = cp * tp if config.sequence_parallel else cp
    if num_tokens is not None and num_tokens % parts:
        raise user_error(
            "context-parallel size" + (" x tensor-parallel size" if config.sequence_parallel else ""),
            parts,
            f"a divisor of the {num_tokens} tokens of a sample",
            f"Nearest: {nearest_divisors(parts, num_tokens)}; or tokens: {nearest_multiples(num_tokens, parts)}.",
        )
