"""What a rank needs of its neighbours' pieces, where a picture or a video is cut into contiguous pieces."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_cosmos.parallel.pieces import memory_axis
from nemo_cosmos.parallel.tokens import AutogradContext


def exchange_halo(x: Tensor, dim: int, group: dist.ProcessGroup, *, before: int = 0, after: int = 0) -> Tensor:
    """Lengthens a rank's piece by the neighbours' nearest entries, with zeros at the two outer ends.

    Args:
        x: This rank's piece, [B, C, ...] in channels-last memory; at least `before` and `after` long.
        dim: Axis along which the whole is cut, in the order of the ranks.
        group: The ranks.
        before: Entries taken from the previous rank's end.
        after: Entries taken from the next rank's beginning.

    Returns:
        `x` with `before` + `after` entries more, in channels-last memory. The backward pass takes the gradient of
        these back to the ranks that own them.
    """
    assert x.shape[dim] >= max(before, after), f"{x.shape[dim]} entries are too few for a halo of {before}, {after}"
    return _ExchangeHalo.apply(x, memory_axis(dim % x.ndim, x.ndim), group, before, after)


class _ExchangeHalo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, axis: int, group: dist.ProcessGroup, before: int, after: int
    ) -> Tensor:
        ctx.axis, ctx.group, ctx.sizes = axis, group, (before, x.movedim(1, -1).shape[axis], after)
        own = x.movedim(1, -1)
        head, tail = own.narrow(axis, 0, after), own.narrow(axis, own.shape[axis] - before, before)
        previous, following = _swap(head, tail, group)
        return torch.cat([previous, own, following], axis).movedim(-1, 1)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        before, length, after = ctx.sizes
        of_previous, own, of_following = grad.movedim(1, -1).split(ctx.sizes, ctx.axis)
        for_head, for_tail = _swap(of_previous, of_following, ctx.group)
        own = own.clone(memory_format=torch.contiguous_format)
        own.narrow(ctx.axis, 0, after).add_(for_head)
        own.narrow(ctx.axis, length - before, before).add_(for_tail)
        return own.movedim(-1, 1), None, None, None, None


def _swap(to_previous: Tensor, to_next: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sends to both neighbours, and returns what came from the previous and from the next one; zeros from nobody.

    All ranks send tensors of one size each way, so what comes from one side is as large as what goes to the other.
    """
    rank, last = group.rank(), group.size() - 1
    from_previous, from_next = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (to_next, to_previous)
    )
    messages: list[dist.P2POp] = []
    for is_there, neighbour, sent, received in (
        (rank > 0, rank - 1, to_previous, from_previous),
        (rank < last, rank + 1, to_next, from_next),
    ):
        if is_there:
            peer = dist.get_global_rank(group, neighbour)
            if sent.numel():
                messages.append(dist.P2POp(dist.isend, sent.contiguous(), peer, group))
            if received.numel():
                messages.append(dist.P2POp(dist.irecv, received, peer, group))
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()
    return from_previous, from_next
