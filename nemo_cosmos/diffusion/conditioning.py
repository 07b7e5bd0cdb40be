"""What a training sample draws and what a given frame does to the network's input.

Every draw depends on (seed, draw_id) alone, never on the rank: the same sample is noised alike in every parallel
layout, and each pipeline stage can draw it again instead of sending it on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nemo_cosmos.diffusion.objective import EDM, per_sample
from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """Text dropout and given frames (Video2World)."""

    text_dropout: float = 0.2
    """Probability of replacing a sample's text states by zeros, for classifier-free guidance."""
    min_condition_frames: int = 0
    """Fewest latent frames given as condition; 0 with `max_condition_frames` 0 is Text2World."""
    max_condition_frames: int = 0
    """Most latent frames given; the number is drawn uniformly. A picture, of one latent frame, is given none."""
    condition_dropout: float = 0.0
    """Probability of hiding the given frames, for guidance: zeros stand in their slots and the mask says nothing of
    them, but the loss leaves them out as ever. Of a diffusion decoder, of hiding the tokens."""
    action_dropout: float = 0.0
    """Probability of replacing a sample's actions by zeros."""
    augment_sigma: float = 0.001
    """Noise level of given frames, or the median of the levels that samples draw; the published inference value."""
    augment_p_std: float = 0.0
    """Standard deviation of ln(augment_sigma) over the samples; 0 gives all of them the same."""

    def __post_init__(self) -> None:
        """Refuses impossible probabilities and counts."""
        for name in ("text_dropout", "condition_dropout", "action_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise user_error(name, getattr(self, name), "a probability in [0, 1]", "Correct the recipe.")
        if not 0 <= self.min_condition_frames <= self.max_condition_frames:
            got = (self.min_condition_frames, self.max_condition_frames)
            raise user_error("min/max_condition_frames", got, "0 <= min <= max", "Correct the recipe.")
        if self.augment_sigma <= 0 or self.augment_p_std < 0:
            got = (self.augment_sigma, self.augment_p_std)
            raise user_error("augment_sigma, augment_p_std", got, "above 0, and 0 or more", "Correct the recipe.")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a batch."""

    sigma_normal: torch.Tensor
    """N(0, 1), [B]; see `EDM.sigma_of`."""
    noise: torch.Tensor
    """N(0, 1), B C T H W."""
    augment_noise: torch.Tensor
    """N(0, 1), B C T H W, for given frames."""
    keep_text: torch.Tensor
    """float 0 or 1, [B]."""
    keep_actions: torch.Tensor
    """float 0 or 1, [B]."""
    num_condition_frames: torch.Tensor
    """int64 [B], latent frames."""
    keep_frames: torch.Tensor
    """float 0 or 1, [B]; whether the given frames, or the tokens of a diffusion decoder, are shown."""
    augment_sigma: torch.Tensor
    """Noise level of given frames, [B]."""


def draw(config: ConditioningConfig, shape: torch.Size, draw_ids: torch.Tensor, *, seed: int) -> Draws:
    """Draws what training needs for a batch.

    Args:
        config: The laws.
        shape: B, C, T, H, W of the latents.
        draw_ids: int64 [B]; the samples' keys.
        seed: Of the run.

    Returns:
        The draws, on the CPU, float32.
    """
    one_sample = [_draw_one(config, shape, seed, draw_id) for draw_id in draw_ids.tolist()]
    columns = [torch.stack(values) for values in zip(*one_sample, strict=True)]
    return Draws(
        sigma_normal=columns[0],
        noise=columns[1],
        augment_noise=columns[2],
        keep_text=columns[3],
        keep_actions=columns[4],
        num_condition_frames=columns[5],
        keep_frames=columns[6],
        augment_sigma=columns[7],
    )


def _draw_one(config: ConditioningConfig, shape: torch.Size, seed: int, draw_id: int) -> tuple[torch.Tensor, ...]:
    # Not torch's CPU generator: it keeps 32 bits of its seed, too few for a pair of keys.
    generator = np.random.Generator(np.random.Philox(key=[seed, draw_id]))
    sigma_normal = torch.tensor(generator.standard_normal(dtype=np.float32))
    uniforms = torch.from_numpy(generator.random(4, dtype=np.float32))
    noise = torch.from_numpy(generator.standard_normal(shape[1:], dtype=np.float32))
    augment_noise = torch.from_numpy(generator.standard_normal(shape[1:], dtype=np.float32))
    span = config.max_condition_frames - config.min_condition_frames + 1
    frames = config.min_condition_frames + (uniforms[0] * span).long().clamp(max=span - 1)
    keep_frames = (uniforms[1] >= config.condition_dropout).float()
    keep_text = (uniforms[2] >= config.text_dropout).float()
    keep_actions = (uniforms[3] >= config.action_dropout).float()
    # Drawn last, so that runs without it draw what they always drew.
    augment_normal = torch.tensor(generator.standard_normal(dtype=np.float32))
    augment_sigma = config.augment_sigma * (config.augment_p_std * augment_normal).exp()
    return sigma_normal, noise, augment_noise, keep_text, keep_actions, frames, keep_frames, augment_sigma


def condition_mask(num_condition_frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Marks given latent frames.

    Args:
        num_condition_frames: int64 [B]; frames given from the start.
        shape: B, C, T, H, W of the latents.

    Returns:
        float32 [B, 1, T, H, W]; 1 where given.
    """
    frame = torch.arange(shape[2], device=num_condition_frames.device)
    given_BT = (frame < num_condition_frames.unsqueeze(1)).float()
    return given_BT[:, None, :, None, None].expand(shape[0], 1, shape[2], shape[3], shape[4])


def network_input(
    edm: EDM,
    noisy: torch.Tensor,
    sigma_B: torch.Tensor,
    given: torch.Tensor,
    mask: torch.Tensor,
    augment_noise: torch.Tensor,
    augment_sigma: float | torch.Tensor,
) -> torch.Tensor:
    """Scales the noisy latent for the network and puts the given frames in their slots.

    Given frames carry noise of level `augment_sigma` and the scale of that level, whatever the sample's own sigma.

    Args:
        edm: Preconditioning.
        noisy: Latent plus sigma times noise, B C T H W.
        sigma_B: Noise level per sample.
        given: Clean latent to take the given frames from, B C T H W.
        mask: 1 where given, B 1 T H W.
        augment_noise: N(0, 1), B C T H W.
        augment_sigma: Noise level of given frames, one number or one per sample.

    Returns:
        B C T H W, about unit variance.
    """
    scaled = noisy * edm.c_in(per_sample(sigma_B))
    level = per_sample(torch.as_tensor(augment_sigma, dtype=noisy.dtype, device=noisy.device))
    augmented = (given + level * augment_noise) * edm.c_in(level)
    return torch.where(mask.bool(), augmented, scaled)
