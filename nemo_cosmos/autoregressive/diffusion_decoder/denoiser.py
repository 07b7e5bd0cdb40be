"""From network output to an estimate of the clean latent, with guidance, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_cosmos.autoregressive.diffusion_decoder.model import HIDDEN_TOKEN
from nemo_cosmos.autoregressive.diffusion_decoder.windows import blend_windows
from nemo_cosmos.diffusion.objective import EDM, per_sample


@dataclass(kw_only=True)
class TokenDenoiser:
    """The denoiser that samplers integrate, for one batch of videos.

    A video longer than a window is denoised as a whole: at every level the windows are estimated and blended, so that
    they agree at every step. The published inference samples each window by itself and blends pixels, in which what
    was drawn for one window and for the next shows through.

    Guidance is cond + g (cond - uncond), where the branch without conditions has neither text nor tokens.

    Source: NVIDIA cosmos-predict1, `autoregressive/diffusion_decoder/{model,inference}.py`; blending at every level is
    that of Bar-Tal et al. 2023, MultiDiffusion, https://arxiv.org/abs/2302.08113.
    """

    network: Callable[..., torch.Tensor]
    """A `DiffusionDecoderDiT`, or one in stages."""
    edm: EDM
    tokens: torch.Tensor
    """int [B, T, H, W]."""
    text_emb: torch.Tensor
    """B L D."""
    fps: torch.Tensor
    """[B]."""
    guidance: float
    """g; 0 runs the conditional branch alone."""
    window: int
    """Latent frames that the network sees at once; no more than there are."""
    overlap: int
    """Latent frames that two windows share."""

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Estimates the clean latent, B C T H W, of a noisy one at a scalar noise level."""
        sigma_B = sigma.to(noisy).expand(noisy.shape[0])

        def estimate(frames: slice) -> torch.Tensor:
            return self._estimate(noisy[:, :, frames], self.tokens[:, frames], sigma_B)

        return blend_windows(estimate, noisy.shape[2], window=self.window, overlap=self.overlap)

    def _estimate(self, noisy: torch.Tensor, tokens: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        text, branches = self.text_emb, 1
        if self.guidance:
            text, branches = torch.cat([text, torch.zeros_like(text)]), 2
            tokens = torch.cat([tokens, torch.full_like(tokens, HIDDEN_TOKEN)])
        output = self.network(
            (noisy * self.edm.c_in(per_sample(sigma_B))).repeat(branches, 1, 1, 1, 1),
            self.edm.c_noise(sigma_B).repeat(branches),
            text,
            fps=self.fps.repeat(branches),
            tokens_BTHW=tokens,
        ).float()
        if self.guidance:
            cond, uncond = output.chunk(2)
            output = cond + self.guidance * (cond - uncond)  # of the outputs, as of the estimates: these are linear
        return self.edm.denoised(noisy, output, sigma_B)
