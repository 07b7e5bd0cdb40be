"""The activation of the transformers' MLPs."""

from __future__ import annotations

import torch
from torch.nn import functional


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU without approximation. Overwrites `x`, the largest tensor of a block, where it needs no gradient.

    On CPUs a new tensor's pages, which the system hands out one by one, take four times as long as the values.

    Args:
        x: Output of a linear layer that nothing else reads.

    Returns:
        As `x`.
    """
    return functional.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)
