"""What a rank needs of its neighbours' pieces, where a picture or a video is cut into contiguous pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_cosmos.parallel.pieces import memory_axis
from nemo_cosmos.parallel.tokens import AutogradContext


def exchange_halo(x: Tensor, dim: int, group: dist.ProcessGroup, *, before: int = 0, after: int = 0) -> Tensor:
    """Lengthens a rank's piece by the neighbours' nearest entries, with zeros at the two outer ends.

    Args:
        x: This rank's piece, [B, C, ...] in channels-last memory; at least as long as what its neighbours take of it.
        dim: Axis along which the whole is cut, in the order of the ranks.
        group: The ranks.
        before: Entries taken from the previous rank's end.
        after: Entries taken from the next rank's beginning.

    Returns:
        `x` with `before` + `after` entries more, in channels-last memory. The backward pass takes the gradient of
        these back to the ranks that own them.
    """
    return _ExchangeHalo.apply(x, memory_axis(dim % x.ndim, x.ndim), group, before, after)


class _ExchangeHalo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, axis: int, group: dist.ProcessGroup, before: int, after: int
    ) -> Tensor:
        own = x.movedim(1, -1)
        length = own.shape[axis]
        taken = _Taken(after if group.rank() > 0 else 0, before if group.rank() < group.size() - 1 else 0)
        assert length >= max(taken), f"{length} entries are too few for neighbours that take {taken}"
        ctx.axis, ctx.group, ctx.sizes, ctx.taken = axis, group, (before, length, after), taken
        head, tail = own.narrow(axis, 0, taken.head), own.narrow(axis, length - taken.tail, taken.tail)
        previous, following = (own.new_zeros(*own.shape[:axis], n, *own.shape[axis + 1 :]) for n in (before, after))
        _swap(head, tail, previous, following, group)
        return torch.cat([previous, own, following], axis).movedim(-1, 1)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        axis, length = ctx.axis, ctx.sizes[1]
        of_previous, own, of_next = grad.movedim(1, -1).split(ctx.sizes, axis)
        own = own.clone(memory_format=torch.contiguous_format)
        head, tail = own.narrow(axis, 0, ctx.taken.head), own.narrow(axis, length - ctx.taken.tail, ctx.taken.tail)
        for_head, for_tail = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (head, tail))
        _swap(of_previous, of_next, for_head, for_tail, ctx.group)
        head += for_head
        tail += for_tail
        return own.movedim(-1, 1), None, None, None, None


class _Taken(NamedTuple):
    """How many entries of a rank's piece its neighbours take."""

    head: int
    """By the previous rank."""
    tail: int
    """By the next one."""


def _swap(
    to_previous: Tensor, to_next: Tensor, from_previous: Tensor, from_next: Tensor, group: dist.ProcessGroup
) -> None:
    """Sends two tensors to the neighbours and fills two with what these send, if there are any."""
    rank = group.rank()
    messages: list[dist.P2POp] = []
    for neighbour, sent, received in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
        if 0 <= neighbour < group.size():
            peer = dist.get_global_rank(group, neighbour)
            if sent.numel():
                messages.append(dist.P2POp(dist.isend, sent.contiguous(), peer, group))
            if received.numel():
                messages.append(dist.P2POp(dist.irecv, received, peer, group))
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()
