"""An autoregressive transformer's architecture as plain values, for checkpoint cards."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_cosmos.autoregressive.config import ARConfig, Yarn
from nemo_cosmos.errors import user_error

_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "vocab_size",
    "special_tokens",
    "make_vocab_size_divisible_by",
    "share_embeddings_and_output_weights",
    "rotary_base",
    "yarn",
    "extra_pos_embed",
    "crossattn_emb_channels",
    "num_medusa_heads",
    "action_dim",
)
"""What the weights' names, shapes and meaning depend on; all else in `ARConfig` is how to run it."""


def is_architecture(values: dict[str, Any]) -> bool:
    """Tells whether a card's configuration is that of an autoregressive transformer."""
    return {"vocab_size", "rotary_base"} <= values.keys()


def architecture_of(config: ARConfig) -> dict[str, Any]:
    """Returns the architecture as JSON values."""
    values = {name: getattr(config, name) for name in _FIELDS}
    if config.yarn is not None:
        values["yarn"] = {**dataclasses.asdict(config.yarn), "original_grid": list(config.yarn.original_grid)}
    return values


def config_from(architecture: dict[str, Any], **overrides: Any) -> ARConfig:  # noqa: ANN401 - any field of ARConfig
    """Builds a configuration from what `architecture_of` gave.

    Args:
        architecture: The values.
        **overrides: Fields of how to run it, such as the parallel sizes.

    Raises:
        UserError: A value is missing or unknown.
    """
    missing, unknown = sorted(set(_FIELDS) - set(architecture)), sorted(set(architecture) - set(_FIELDS))
    if missing or unknown:
        raise user_error(
            "autoregressive architecture",
            f"missing {missing}, unknown {unknown}",
            "exactly the known fields",
            "Check the card.",
        )
    values = dict(architecture)
    if (yarn := architecture["yarn"]) is not None:
        values["yarn"] = Yarn(**{**yarn, "original_grid": tuple(yarn["original_grid"])})
    return ARConfig(**values, **overrides)
