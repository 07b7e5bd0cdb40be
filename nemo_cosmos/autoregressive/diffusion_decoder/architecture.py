"""A diffusion decoder's architecture as plain values, for checkpoint cards."""

from __future__ import annotations

from typing import Any

from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.diffusion import architecture as dit
from nemo_cosmos.errors import user_error

_FIELDS = ("token_vocab_size", "token_emb_channels", "token_upsampling")
"""What it has besides those of a DiT."""


def is_architecture(values: dict[str, Any]) -> bool:
    """Tells whether a card's configuration is that of a diffusion decoder."""
    return "token_vocab_size" in values


def architecture_of(config: DiffusionDecoderConfig) -> dict[str, Any]:
    """Returns the architecture as JSON values."""
    return {**dit.architecture_of(config), **{name: getattr(config, name) for name in _FIELDS}}


def config_from(architecture: dict[str, Any], **overrides: Any) -> DiffusionDecoderConfig:  # noqa: ANN401 - any field
    """Builds a configuration from what `architecture_of` gave.

    Args:
        architecture: The values.
        **overrides: Fields of how to run it, such as the parallel sizes.

    Raises:
        UserError: A value is missing or unknown.
    """
    missing = sorted(set(_FIELDS) - set(architecture))
    if missing:
        raise user_error("diffusion decoder architecture", f"missing {missing}", "the known fields", "Check the card.")
    shared = {name: value for name, value in architecture.items() if name not in _FIELDS}
    own = {name: architecture[name] for name in _FIELDS}
    return DiffusionDecoderConfig(**dit.fields_from(shared), **own, **overrides)
