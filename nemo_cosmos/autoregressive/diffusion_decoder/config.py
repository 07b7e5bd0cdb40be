"""Configuration of the diffusion decoder's network and its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from nemo_cosmos.diffusion.config import SIZES_7B, SIZES_TINY, DiTConfig
from nemo_cosmos.errors import user_error


@dataclass(kw_only=True)
class DiffusionDecoderConfig(DiTConfig):
    """A Cosmos DiT whose patches hold, behind the noisy latent, the embedded tokens of the same place."""

    token_vocab_size: int = 64_000
    """Codes of the discrete tokenizer."""
    token_emb_channels: int = 32
    """Channels that a token adds to the latent's."""
    token_upsampling: int = 2
    """Latent rows, and columns, to one token's: what the discrete tokenizer compresses more than the continuous one."""
    init_token_levels: tuple[int, ...] | None = None
    """Levels of the quantizer whose codes the tokens are. Codes that are near each other begin with embeddings near
    each other, which is learnt sooner; None begins at zero, as the published one."""
    extra_pos_embed: Literal["learnable", "sincos"] | None = None

    def __post_init__(self) -> None:
        """Refuses what the model cannot be.

        Raises:
            UserError: A size does not fit.
        """
        super().__post_init__()
        got = (self.token_vocab_size, self.token_emb_channels, self.token_upsampling)
        if self.token_vocab_size < 2 or min(got) < 1:
            names = "token_vocab_size, token_emb_channels, token_upsampling"
            raise user_error(names, got, "2 or more, and 1 or more", "Correct the configuration.")
        levels = self.init_token_levels
        if levels is not None and math.prod(levels) != self.token_vocab_size:
            expected = f"levels whose product is token_vocab_size {self.token_vocab_size}"
            raise user_error("init_token_levels", levels, expected, "Give the tokenizer's levels, or None.")
        if self.action_dim is not None:
            raise user_error("action_dim", self.action_dim, "None", "The tokens hold what the actions did.")

    @property
    def patch_channels(self) -> int:
        """Channels that enter the patch embedding: latent, tokens, masks."""
        return super().patch_channels + self.token_emb_channels


def diffusion_decoder_7b(**overrides: Any) -> DiffusionDecoderConfig:  # noqa: ANN401 - any field
    """The published 7B, from DV8x16x16 to CV8x8x8: 7,237,257,216 parameters and the uncertainty head of 128."""
    return DiffusionDecoderConfig(**{**SIZES_7B, "rope_ratio": (1.0, 1.5, 1.5), **overrides})


def diffusion_decoder_tiny(**overrides: Any) -> DiffusionDecoderConfig:  # noqa: ANN401 - any field
    """One that trains on a CPU in minutes, for the 4,096 codes of DV8x8x8-tiny and the latents of CV8x8x8-tiny."""
    tokens = {"token_vocab_size": 4096, "token_upsampling": 1, "init_token_levels": (8, 8, 8, 8)}
    return DiffusionDecoderConfig(**{**SIZES_TINY, **tokens, **overrides})


PRESETS = {"diffusion_decoder_7b": diffusion_decoder_7b, "diffusion_decoder_tiny": diffusion_decoder_tiny}
"""Configurations by name."""
