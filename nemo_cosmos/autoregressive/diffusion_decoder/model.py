"""The diffusion decoder's network: a Cosmos DiT with embedded tokens beside the noisy latent.

Letters: B = batch, C = channels of the latent, E = channels of an embedded token, T H W = latent frames, rows, columns,
A = axes of a code, V = codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.diffusion.model import CosmosDiT, Fps
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.tokens import count_once

HIDDEN_TOKEN = 0
"""Stands in every place where the tokens are dropped; the published network has no embedding of its own for that."""


_FIRST_SCALE = 0.3
"""Root mean square of an embedding that does not begin at zero; a latent's, times c_in, is 1."""


def first_embedding(config: DiffusionDecoderConfig) -> torch.Tensor:
    """The tokens' embedding before training, [vocabulary, channels].

    With levels, a code's channels are cosines of rising frequency of where it stands on each of its axes: those that
    are orthogonal over the levels (the basis of the DCT).
    """
    shape = (config.token_vocab_size, config.token_emb_channels)
    if config.init_token_levels is None:
        return torch.zeros(shape, dtype=config.params_dtype)
    codes, places = torch.arange(config.token_vocab_size), []
    for levels in config.init_token_levels:  # the first axis of a code runs fastest
        places.append((codes % levels + 0.5) / levels)
        codes = codes // levels
    places_AV = torch.stack(places)
    frequencies = range(1, 2 + (config.token_emb_channels - 1) // len(places))
    channels_CV = torch.cat([torch.cos(math.pi * k * places_AV) for k in frequencies])[: config.token_emb_channels]
    return (_FIRST_SCALE * math.sqrt(2) * channels_CV.T).to(config.params_dtype).contiguous()


class DiffusionDecoderDiT(CosmosDiT):
    """The network F of the EDM denoiser, given tokens.

    Their embedding starts at zero, as the published one, or near it: so a network that starts from a WFM's weights
    begins as it.

    Args:
        config: Sizes and layout.
        pre_process: Whether this stage embeds latent and tokens.
        **stage: As for `CosmosDiT`.

    Raises:
        UserError: The layout cannot hold this model; raised before any weight is allocated.
    """

    def __init__(self, config: DiffusionDecoderConfig, *, pre_process: bool = True, **stage: Any) -> None:  # noqa: ANN401 - of CosmosDiT
        super().__init__(config, pre_process=pre_process, **stage)
        if pre_process:
            self.token_embedder = nn.Embedding.from_pretrained(first_embedding(config), freeze=False)

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        timesteps_B: torch.Tensor,
        crossattn_emb_BLD: torch.Tensor,
        *,
        tokens_BTHW: torch.Tensor,
        fps: Fps = None,
        padding_mask_B1HW: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts; see `CosmosDiT.forward`.

        Args:
            x_BCTHW: Noisy latent times c_in.
            timesteps_B: c_noise of each sample.
            crossattn_emb_BLD: Text tokens, padding zeroed.
            tokens_BTHW: Codes, int, on the latent's grid, or on one that is coarser by `token_upsampling`.
            fps: As for `CosmosDiT`.
            padding_mask_B1HW: As for `CosmosDiT`.

        Raises:
            UserError: A size does not fit the model, the layout or the latent.
        """
        batch, _, frames, height, width = x_BCTHW.shape
        times = self.config.token_upsampling
        expected = (batch, frames, height // times, width // times)
        if tuple(tokens_BTHW.shape) != expected or (height % times, width % times) != (0, 0):
            raise user_error(
                "tokens",
                tuple(tokens_BTHW.shape),
                f"{expected}, for the latent of {height}x{width} and token_upsampling {times}",
                "Give the tokens of the same video.",
            )
        return self._forward_batch(
            x_BCTHW, timesteps_B, crossattn_emb_BLD, fps, padding_mask_B1HW, None, None, tokens_BTHW
        )

    def _forward(self, groups: Any, x_BCTHW: torch.Tensor, *conditions: Any) -> torch.Tensor:  # noqa: ANN401 - of CosmosDiT
        *conditions, tokens_BTHW = conditions
        if self.pre_process:
            # Context-parallel ranks cut what they embed afterwards, so each has the whole gradient.
            told_BETHW = count_once(self._embed(tokens_BTHW, x_BCTHW.shape[-2:]).to(x_BCTHW.dtype), groups.cp)
            x_BCTHW = torch.cat([x_BCTHW, told_BETHW], dim=1)
        return super()._forward(groups, x_BCTHW, *conditions)

    def _embed(self, tokens_BTHW: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """B T h w -> B E T H W; a coarser grid is brought to the latent's by bilinear interpolation."""
        told_BTHWE = self.token_embedder(tokens_BTHW.long())
        told_FEHW = rearrange(told_BTHWE, "B T H W E -> (B T) E H W")
        if self.config.token_upsampling > 1:
            told_FEHW = functional.interpolate(told_FEHW.float(), size=size, mode="bilinear").to(told_FEHW.dtype)
        return rearrange(told_FEHW, "(B T) E H W -> B E T H W", T=tokens_BTHW.shape[1])
