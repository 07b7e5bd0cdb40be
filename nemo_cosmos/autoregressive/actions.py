"""What turns actions into tokens that the network attends to beside those of the text.

Letters: B = batch, F = actions, A = channels of an action, C = channels of a text token.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_HIDDEN_SHARE = 4
"""Published: the hidden layer is a quarter as wide as a text token."""


class ActionEmbedder(nn.Module):
    """Two layers from an action to a token; tokens also tell which action of the clip they are.

    The published model is given one action, which needs no place; a clip's need one, for attention sees a set. It is
    told as Transformers tell places, by sines and cosines.

    Args:
        action_dim: A.
        channels: C, even.
        dtype: Of the weights.

    Source: cosmos-predict1, `autoregressive/training/networks/transformer.py`; Vaswani et al., Attention Is All You
    Need, https://arxiv.org/abs/1706.03762, 3.5.
    """

    def __init__(self, action_dim: int, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(action_dim, channels // _HIDDEN_SHARE, dtype=dtype)
        self.linear_2 = nn.Linear(channels // _HIDDEN_SHARE, channels, dtype=dtype)

    def forward(self, actions_BFA: torch.Tensor) -> torch.Tensor:
        """[B, F, A] -> [B, F, C]."""
        embedded_BFC = self.linear_2(torch.relu(self.linear_1(actions_BFA)))
        return embedded_BFC + _places(*embedded_BFC.shape[1:], embedded_BFC.device).to(embedded_BFC.dtype)


def _places(num_actions: int, channels: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of each action's number, float32 [F, C]."""
    even = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    angles = torch.arange(num_actions, device=device)[:, None] * torch.exp(-math.log(10_000.0) / channels * even)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
