"""Robot and car actions in the range that networks take."""

from __future__ import annotations

import torch

from nemo_cosmos.contracts import ACTION_DIM
from nemo_cosmos.errors import user_error

_SCALE = 20.0
"""Published factor on the six motion components; it brings an arm's steps to about one."""


def scaled_actions(actions: torch.Tensor) -> torch.Tensor:
    """Brings motions to a common range.

    They are scaled by 20 as published and then pass through asinh, which is the identity near zero and keeps the steps
    of a car, thirty times those of an arm, in the same range.

    Args:
        actions: float32 [B, F-1, ACTION_DIM]; metres, radians, opening in [0, 1].

    Returns:
        float32 [B, F-1, ACTION_DIM].

    Raises:
        UserError: The width is not ACTION_DIM.
    """
    if actions.ndim != 3 or actions.shape[-1] != ACTION_DIM:
        raise user_error(
            "actions",
            tuple(actions.shape),
            f"[batch, frames - 1, {ACTION_DIM}] (x, y, z, roll, pitch, yaw, gripper)",
            "Give one row of seven numbers per frame after the first.",
        )
    motion, gripper = actions[..., : ACTION_DIM - 1], actions[..., ACTION_DIM - 1 :]
    return torch.cat([torch.asinh(_SCALE * motion), gripper], dim=-1)
