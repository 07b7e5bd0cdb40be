"""What turns the model's inputs into vectors: patches, time and actions; and the uncertainty head.

Letters: B = batch, D = hidden size, F = 1, or latent frames where a frame has conditions of its own, S = tokens,
s = tokens of this rank.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import Backend


def linear(in_features: int, out_features: int, config: DiTConfig, *, bias: bool = False) -> nn.Linear:
    """A linear layer that every rank holds whole, in the model's dtype."""
    return nn.Linear(in_features, out_features, bias=bias, dtype=config.params_dtype)


def patchify(x_BCTHW: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """B C T H W -> S B (C pt ph pw); tokens run over T, then H, then W."""
    pt, ph, pw = patch_size
    return rearrange(x_BCTHW, "B C (T pt) (H ph) (W pw) -> (T H W) B (C pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x_SBP: torch.Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """S B (ph pw pt C) -> B C T H W. The published model orders its output so, unlike its input."""
    frames, height, width = grid
    pt, ph, pw = patch_size
    return rearrange(
        x_SBP, "(T H W) B (ph pw pt C) -> B C (T pt) (H ph) (W pw)", T=frames, H=height, W=width, pt=pt, ph=ph, pw=pw
    )


class PatchEmbed(nn.Module):
    """Patches to hidden vectors."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = linear(config.patch_channels * config.patch_volume, config.hidden_size, config)

    def tokens(
        self,
        x_BCTHW: torch.Tensor,
        condition_mask_B1THW: torch.Tensor | None,
        padding_mask_B1HW: torch.Tensor | None,
    ) -> torch.Tensor:
        """Puts the mask channels behind the latent's and cuts patches: S B (C pt ph pw).

        Args:
            x_BCTHW: Latents.
            condition_mask_B1THW: 1 where a latent is given; None means nowhere.
            padding_mask_B1HW: 1 where a pixel is padding, at any resolution; None means nowhere.
        """
        channels = [x_BCTHW]
        plane = x_BCTHW[:, :1]
        if self.config.concat_condition_mask:
            mask = torch.zeros_like(plane) if condition_mask_B1THW is None else condition_mask_B1THW.to(plane)
            channels.append(mask.expand_as(plane))
        elif condition_mask_B1THW is not None:
            raise user_error("condition_mask_B1THW", "a mask", "None", "This model has concat_condition_mask off.")
        if self.config.concat_padding_mask:
            channels.append(_padding_channel(padding_mask_B1HW, plane))
        elif padding_mask_B1HW is not None:
            raise user_error("padding_mask_B1HW", "a mask", "None", "This model has concat_padding_mask off.")
        return patchify(torch.cat(channels, dim=1), self.config.patch_size)

    def forward(self, patches_sBP: torch.Tensor) -> torch.Tensor:
        """[s, B, C pt ph pw] -> [s, B, D]."""
        return self.proj(patches_sBP.to(self.proj.weight.dtype))


def _padding_channel(mask_B1HW: torch.Tensor | None, plane: torch.Tensor) -> torch.Tensor:
    if mask_B1HW is None:
        return torch.zeros_like(plane)
    if mask_B1HW.shape[-2:] != plane.shape[-2:]:
        mask_B1HW = functional.interpolate(mask_B1HW.float(), size=plane.shape[-2:], mode="nearest")
    return mask_B1HW.to(plane)[:, :, None].expand_as(plane)


def timestep_features(timesteps_B: torch.Tensor, channels: int) -> torch.Tensor:
    """Cosines, then sines, of the time at frequencies 10000^(-2i / channels); float32 [B, channels]."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
    angles = timesteps_B.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Time features to the vector of width 3 D that all adaptive norms share."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear_1 = linear(config.hidden_size, config.hidden_size, config)
        self.linear_2 = linear(config.hidden_size, 3 * config.hidden_size, config)

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, 3 D]."""
        return self.linear_2(functional.silu(self.linear_1(features_BD)))


class ActionEmbedder(nn.Module):
    """Two layers from a latent frame's actions to a vector; the last starts at zero: actions begin without effect."""

    def __init__(self, config: DiTConfig, out_features: int) -> None:
        super().__init__()
        self.width = config.action_dim * config.action_frames_per_latent
        self.linear_1 = linear(self.width, 4 * config.hidden_size, config, bias=True)
        self.linear_2 = linear(4 * config.hidden_size, out_features, config, bias=True)

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., out_features]."""
        return self.linear_2(functional.gelu(self.linear_1(actions), approximate="tanh"))


class ConditionEmbedder(nn.Module):
    """Time, and actions where the model takes them, to what the adaptive norms read.

    Source: time: Cosmos, https://arxiv.org/abs/2501.03575, 5.1.2. Actions: the same, 6.2: one network's output is added
    to the time features, another's to the shared vector; here for each latent frame.
    """

    def __init__(self, config: DiTConfig, backend: Backend) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.t_embedder = TimestepEmbedder(config)
        self.affline_norm = backend.rms_norm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.takes_actions = config.action_dim is not None
        if self.takes_actions:
            self.action_embedder = ActionEmbedder(config, config.hidden_size)
            self.action_embedder_adaln = ActionEmbedder(config, 3 * config.hidden_size)

    def forward(
        self, timesteps_B: torch.Tensor, actions_BTA: torch.Tensor | None, frames: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds.

        Args:
            timesteps_B: Noise level c_noise of each sample.
            actions_BTA: Actions of each latent frame, or None.
            frames: Latent frames that this rank's tokens belong to; others are not embedded.

        Returns:
            Embedding [F, B, D] after SiLU, and shared vector [F, B, 3 D]; F is 1 without actions.
        """
        dtype = self.t_embedder.linear_1.weight.dtype
        features_FBD = timestep_features(timesteps_B, self.hidden_size).to(dtype)[None]
        shared_FBC = self.t_embedder(features_FBD)
        if actions_BTA is not None:
            actions_FBA = rearrange(actions_BTA[:, frames], "B F A -> F B A").to(dtype)
            features_FBD = features_FBD + self.action_embedder(actions_FBA)
            shared_FBC = shared_FBC + self.action_embedder_adaln(actions_FBA)
        return functional.silu(self.affline_norm(features_FBD)), shared_FBC

    def check_actions(self, actions_BTA: torch.Tensor | None, batch_size: int, num_frames: int) -> None:
        """Refuses actions that the model does not take.

        Raises:
            UserError: The shape is wrong, or the model was built without `action_dim`.
        """
        if actions_BTA is None:
            return
        if not self.takes_actions:
            raise user_error("actions", tuple(actions_BTA.shape), "None", "Build the model with action_dim set.")
        expected = (batch_size, num_frames, self.action_embedder.width)
        if tuple(actions_BTA.shape) != expected:
            raise user_error(
                "actions",
                tuple(actions_BTA.shape),
                f"{expected} (batch, latent frames, width)",
                "Group them per latent frame.",
            )


class UncertaintyHead(nn.Module):
    """Log-variance of the loss at a noise level: fixed Fourier features and one linear layer.

    Source: Karras et al., EDM2, https://arxiv.org/abs/2312.02696, appendix B.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(config.uncertainty_channels, dtype=torch.float32))
        self.register_buffer("phases", torch.empty(config.uncertainty_channels, dtype=torch.float32))
        self.linear = linear(config.uncertainty_channels, 1, config)

    def forward(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        """[B] -> float32 [B]."""
        features = math.sqrt(2) * torch.cos(timesteps_B.float()[:, None] * self.freqs.float() + self.phases.float())
        return self.linear(features.to(self.linear.weight.dtype)).float().squeeze(-1)
