"""Text encoders: T5-11B for the published models, a packaged MiniLM for the tiny ones."""

from nemo_cosmos.text.encoder import (
    TEXT_ENCODERS,
    CachedTextEncoder,
    TextEncoder,
    TextEncoderConfig,
    load_text_encoder,
    text_encoder_config,
)

__all__ = [
    "TEXT_ENCODERS",
    "CachedTextEncoder",
    "TextEncoder",
    "TextEncoderConfig",
    "load_text_encoder",
    "text_encoder_config",
]
