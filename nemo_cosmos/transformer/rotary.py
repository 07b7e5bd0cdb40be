"""Turning queries and keys by rotary angles, whatever positions these tell.

Letters: s = tokens of this rank, B = batch, N = heads, H = channels per head.
"""

from __future__ import annotations

import torch


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with T, H and W; a head of 128 has 44, 42, 42."""
    spatial = head_dim // 6 * 2
    return head_dim - 2 * spatial, spatial, spatial


def apply_rope(x_sBNH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns channel pairs (i, i + H / 2) by the tables' angles, in float32; dtype and shape stay."""
    return _Rotate.apply(x_sBNH, *tables)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: so nothing of the input is kept for it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    half = first.shape[-1]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned.to(x.dtype)
