"""From network output to a clean-latent estimate, with guidance and given frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_cosmos.diffusion.conditioning import network_input
from nemo_cosmos.diffusion.objective import EDM, per_sample
from nemo_cosmos.parallel.branches import BranchRanks


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What the network is given of a batch, with conditions or without."""

    scaled: torch.Tensor
    """The network's input, B C T H W."""
    text_emb: torch.Tensor
    """B L D."""
    mask: torch.Tensor
    """1 where the network is told that the latent is given, B 1 T H W."""


@dataclass(kw_only=True)
class VideoDenoiser:
    """The denoiser that samplers integrate, for one batch of videos.

    Source: Cosmos report (arXiv 2501.03575), section 5.1; guidance is cond + g (cond - uncond).
    """

    network: Callable[..., torch.Tensor]
    """A `CosmosDiT`, or one in stages."""
    edm: EDM
    text_emb: torch.Tensor
    """B L D."""
    negative_text_emb: torch.Tensor
    """B L D; zeros where there is no negative prompt, as text dropout trains it."""
    fps: torch.Tensor
    """[B]."""
    given: torch.Tensor
    """Clean latent that holds the given frames, B C T H W, at `edm.sigma_data`."""
    mask: torch.Tensor
    """1 where given, B 1 T H W."""
    augment_noise: torch.Tensor
    """N(0, 1), B C T H W."""
    guidance: float = 0.0
    """g; 0 runs the conditional branch alone."""
    input_frames_guidance: bool = False
    """Whether the unconditional branch lacks the given frames too, and not the text alone."""
    augment_sigma: float = 0.001
    actions: torch.Tensor | None = None
    """[B, T, actions per latent frame]."""
    video2world: bool = False
    """Whether the network has a condition-mask channel."""
    branch_ranks: BranchRanks | None = None
    """Ranks that compute one branch each; None computes both here, in one batch."""

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Estimates the clean latent.

        Args:
            noisy: B C T H W.
            sigma: Noise level, scalar.

        Returns:
            B C T H W, with the given frames in their slots. At levels up to `augment_sigma`, where the latent is no
            noisier than the given frames are made for the network, all frames are the network's own.
        """
        held = self.mask if sigma > self.augment_sigma else torch.zeros_like(self.mask)
        sigma_B = sigma.to(noisy).expand(noisy.shape[0])
        scaled = network_input(self.edm, noisy, sigma_B, self.given, held, self.augment_noise, self.augment_sigma)
        conditional = Branch(scaled=scaled, text_emb=self.text_emb, mask=self.mask)
        if self.guidance:
            cond, uncond = self._both(noisy, sigma_B, conditional, self._unconditional(scaled, held))
            clean = cond + self.guidance * (cond - uncond)
        else:
            clean = self._estimate(noisy, sigma_B, [conditional])
        return torch.where(held.bool(), self.given, clean)

    def _unconditional(self, scaled: torch.Tensor, held: torch.Tensor) -> Branch:
        mask = self.mask
        if self.input_frames_guidance:
            # Zeros stand where frames were given: what the published networks are trained to see without them.
            scaled, mask = scaled.masked_fill(held.bool(), 0.0), torch.zeros_like(mask)
        return Branch(scaled=scaled, text_emb=self.negative_text_emb, mask=mask)

    def _both(
        self, noisy: torch.Tensor, sigma_B: torch.Tensor, cond: Branch, uncond: Branch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.branch_ranks is None:
            both = self._estimate(noisy, sigma_B, [cond, uncond])
            return both[: len(noisy)], both[len(noisy) :]
        own = (cond, uncond)[self.branch_ranks.own]
        return self.branch_ranks.exchange(self._estimate(noisy, sigma_B, [own]))

    def _estimate(self, noisy: torch.Tensor, sigma_B: torch.Tensor, branches: list[Branch]) -> torch.Tensor:
        """Estimates of the branches, one after the other along the batch."""
        times = len(branches)
        sigma_B = sigma_B.repeat(times)
        output = self.network(
            torch.cat([branch.scaled for branch in branches]),
            self.edm.c_noise(sigma_B),
            torch.cat([branch.text_emb for branch in branches]),
            fps=self.fps.repeat(times),
            condition_mask_B1THW=torch.cat([branch.mask for branch in branches]) if self.video2world else None,
            actions_BTA=None if self.actions is None else self.actions.repeat(times, 1, 1),
        )
        level = per_sample(sigma_B)
        return self.edm.c_skip(level) * noisy.repeat(times, 1, 1, 1, 1) + self.edm.c_out(level) * output.float()
