"""Joining, adding up and dividing what the ranks of a group hold, along any axis, with exact gradients.

Tensors are `B C ...` in channels-last memory, as the tokenizers have them, and stay so. A whole is cut into contiguous
pieces in the order of the ranks.

What a function's backward pass does depends on who uses its result. Inside a network every rank computes its own part
of what follows, so gradients of the ranks are parts that add up: `gather`, `share`, `sum_and_split`. After the network
every rank computes the same (the loss convention of `tokens.py`), so each rank has the whole gradient already, and
takes its piece: `gather_result`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from nemo_cosmos.parallel.tokens import AutogradContext

ProcessGroup = dist.ProcessGroup

Sizes = Sequence[int]
"""Length of every rank's piece, in rank order."""


def piece_sizes(total: int, num_pieces: int) -> list[int]:
    """Cuts `total` into pieces that differ by one at most, the longer ones first."""
    length, longer = divmod(total, num_pieces)
    return [length + (rank < longer) for rank in range(num_pieces)]


def sizes_of_ranks(length: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Asks every rank for the length of its piece."""
    own, sizes = (torch.full((n,), length, device=device) for n in (1, group.size()))
    dist.all_gather_into_tensor(sizes, own, group=group)
    return sizes.tolist()


def gather(x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes | None = None) -> Tensor:
    """Joins the pieces of all ranks, for each rank to go on with its own work.

    Args:
        x: This rank's piece, [B, C, ...].
        dim: Axis that is joined.
        group: The ranks.
        sizes: Length of every piece; None where all are alike.

    Returns:
        The whole. The backward pass adds up the gradients of all ranks and takes this rank's piece.
    """
    return _Gather.apply(x, dim % x.ndim, group, sizes or [x.shape[dim]] * group.size())


def gather_result(x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes | None = None) -> Tensor:
    """Joins the pieces of all ranks, for all to do the same with it; the backward pass only takes this rank's piece.

    The arguments are those of `gather`.
    """
    return _GatherResult.apply(x, dim % x.ndim, group, sizes or [x.shape[dim]] * group.size())


def share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `x`, which all ranks hold, for each to go on with its own work: the backward pass adds up gradients."""
    return _Share.apply(x, group)


def sum_and_split(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Adds up the ranks' tensors and gives each an equal piece; the backward pass joins the gradients of all pieces."""
    return _SumAndSplit.apply(x, dim % x.ndim, group, [x.shape[dim] // group.size()] * group.size())


def memory_axis(dim: int, num_dims: int) -> int:
    """Where axis `dim` of a tensor `B C ...` stands once its channels are moved to the end."""
    return num_dims - 1 if dim == 1 else max(0, dim - 1)


def own_piece(x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
    """A view of this rank's piece of a whole."""
    return x.narrow(dim, sum(sizes[: group.rank()]), sizes[group.rank()])


def _join(x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
    axis = memory_axis(dim, x.ndim)
    piece = _lengthened(x.movedim(1, -1), axis, max(sizes)).contiguous()
    blocks = piece.new_empty(group.size() * piece.shape[0], *piece.shape[1:])
    dist.all_gather_into_tensor(blocks, piece, group=group)
    pieces = [block.narrow(axis, 0, size) for block, size in zip(blocks.chunk(group.size()), sizes, strict=True)]
    return torch.cat(pieces, axis).movedim(-1, 1)


def _add_up_and_take(x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
    axis = memory_axis(dim, x.ndim)
    pieces = x.movedim(1, -1).split(list(sizes), axis)
    # Joined tensors keep the memory order of their parts, which the collective would not see.
    blocks = torch.cat([_lengthened(piece, axis, max(sizes)) for piece in pieces]).contiguous()
    own = blocks.new_empty(blocks.shape[0] // group.size(), *blocks.shape[1:])
    dist.reduce_scatter_tensor(own, blocks, group=group)
    return own.narrow(axis, 0, sizes[group.rank()]).movedim(-1, 1)


def _lengthened(x: Tensor, axis: int, length: int) -> Tensor:
    """Zeros at the end of an axis, for collectives take tensors of one size only."""
    missing = length - x.shape[axis]
    return functional.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing]) if missing else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
        ctx.where = (dim, group, sizes)
        return _join(x, *ctx.where)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _add_up_and_take(grad, *ctx.where), None, None, None


class _GatherResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
        ctx.where = (dim, group, sizes)
        return _join(x, *ctx.where)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return own_piece(grad, *ctx.where), None, None, None


class _SumAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sizes) -> Tensor:
        ctx.where = (dim, group, sizes)
        return _add_up_and_take(x, *ctx.where)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _join(grad, *ctx.where), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.movedim(1, -1).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.movedim(-1, 1), None
