"""A DiT's architecture as plain values, for checkpoint cards."""

from __future__ import annotations

from typing import Any

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.errors import user_error

_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "in_channels",
    "out_channels",
    "concat_condition_mask",
    "concat_padding_mask",
    "patch_temporal",
    "patch_spatial",
    "max_latent_size",
    "extra_pos_embed",
    "rope_ratio",
    "base_fps",
    "crossattn_emb_channels",
    "adaln_lora_dim",
    "action_dim",
    "action_frames_per_latent",
    "uncertainty_channels",
)
"""What the weights' names, shapes and meaning depend on; all else in `DiTConfig` is how to run it."""


def is_architecture(values: dict[str, Any]) -> bool:
    """Tells whether a card's configuration is that of a diffusion WFM, and not of a diffusion decoder."""
    return "adaln_lora_dim" in values and "token_vocab_size" not in values


def architecture_of(config: DiTConfig) -> dict[str, Any]:
    """Returns the architecture as JSON values."""
    values = {name: getattr(config, name) for name in _FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def config_from(architecture: dict[str, Any], **overrides: Any) -> DiTConfig:  # noqa: ANN401 - any field of DiTConfig
    """Builds a configuration from what `architecture_of` gave.

    Args:
        architecture: The values.
        **overrides: Fields of how to run it, such as the parallel sizes.

    Raises:
        UserError: A value is missing or unknown.
    """
    return DiTConfig(**fields_from(architecture), **overrides)


def fields_from(architecture: dict[str, Any]) -> dict[str, Any]:
    """Returns what `architecture_of` gave as fields of `DiTConfig`.

    Raises:
        UserError: A value is missing or unknown.
    """
    missing, unknown = sorted(set(_FIELDS) - set(architecture)), sorted(set(architecture) - set(_FIELDS))
    if missing or unknown:
        raise user_error(
            "diffusion architecture",
            f"missing {missing}, unknown {unknown}",
            "exactly the known fields",
            "Check the card.",
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in architecture.items()}
