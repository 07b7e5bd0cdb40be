"""Robot and car actions as the network takes them: one row per latent frame."""

from __future__ import annotations

import torch
from einops import rearrange

from nemo_cosmos.errors import user_error
from nemo_cosmos.transformer.actions import scaled_actions


def actions_per_latent_frame(actions: torch.Tensor, temporal_compression: int) -> torch.Tensor:
    """Groups per-frame actions, scaled by `scaled_actions`, by the latent frame that they lead to.

    Args:
        actions: float32 [B, F-1, ACTION_DIM]; metres, radians, opening in [0, 1].
        temporal_compression: Pixel frames per latent frame after the first.

    Returns:
        float32 [B, T, temporal_compression * ACTION_DIM]; the first latent frame, which nothing leads to, has zeros.

    Raises:
        UserError: The width is not ACTION_DIM, or F is not 1 + k * temporal_compression.
    """
    scaled = scaled_actions(actions)
    if actions.shape[1] == 0 or actions.shape[1] % temporal_compression:
        raise user_error(
            "number of actions",
            actions.shape[1],
            f"a positive multiple of {temporal_compression}",
            "Cut or extend them.",
        )
    grouped = rearrange(scaled, "b (t c) a -> b t (c a)", c=temporal_compression)
    return torch.nn.functional.pad(grouped, (0, 0, 1, 0))
