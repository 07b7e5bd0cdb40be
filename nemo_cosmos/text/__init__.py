"""Text encoders: T5-11B for the published models, a packaged MiniLM for the tiny ones."""

from nemo_cosmos.text.encoder import (
    TEXT_ENCODERS,
    CachedTextEncoder,
    TextEncoder,
    TextEncoderConfig,
    load_text_encoder,
    load_whole_text_encoder,
    text_encoder_config,
    text_encoder_fingerprint,
)
from nemo_cosmos.text.stored import pack_text_states, unpack_text_states

__all__ = [
    "TEXT_ENCODERS",
    "CachedTextEncoder",
    "TextEncoder",
    "TextEncoderConfig",
    "load_text_encoder",
    "load_whole_text_encoder",
    "pack_text_states",
    "text_encoder_config",
    "text_encoder_fingerprint",
    "unpack_text_states",
]
