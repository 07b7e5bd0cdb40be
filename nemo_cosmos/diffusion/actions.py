"""Robot and car actions as the network takes them: one row per latent frame."""

from __future__ import annotations

import torch
from einops import rearrange

from nemo_cosmos.contracts import ACTION_DIM
from nemo_cosmos.errors import user_error

_SCALE = 20.0
"""Published factor on the six motion components; it brings an arm's steps to about one."""


def actions_per_latent_frame(actions: torch.Tensor, temporal_compression: int) -> torch.Tensor:
    """Groups per-frame actions by the latent frame that they lead to.

    Motions are scaled by 20 as published and then pass through asinh, which is the identity near zero and keeps the
    steps of a car, thirty times those of an arm, in the same range.

    Args:
        actions: float32 [B, F-1, ACTION_DIM]; metres, radians, opening in [0, 1].
        temporal_compression: Pixel frames per latent frame after the first.

    Returns:
        float32 [B, T, temporal_compression * ACTION_DIM]; the first latent frame, which nothing leads to, has zeros.

    Raises:
        UserError: The width is not ACTION_DIM, or F is not 1 + k * temporal_compression.
    """
    if actions.ndim != 3 or actions.shape[-1] != ACTION_DIM:
        raise user_error(
            "actions",
            tuple(actions.shape),
            f"[batch, frames - 1, {ACTION_DIM}] (x, y, z, roll, pitch, yaw, gripper)",
            "Give one row of seven numbers per frame after the first.",
        )
    if actions.shape[1] == 0 or actions.shape[1] % temporal_compression:
        raise user_error(
            "number of actions",
            actions.shape[1],
            f"a positive multiple of {temporal_compression}",
            "Cut or extend them.",
        )
    motion, gripper = actions[..., : ACTION_DIM - 1], actions[..., ACTION_DIM - 1 :]
    scaled = torch.cat([torch.asinh(_SCALE * motion), gripper], dim=-1)
    grouped = rearrange(scaled, "b (t c) a -> b t (c a)", c=temporal_compression)
    return torch.nn.functional.pad(grouped, (0, 0, 1, 0))
