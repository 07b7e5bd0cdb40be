"""Group norm of pictures that several ranks share, each holding some of the channels or some of the rows.

Letters: B = batch, C = channels, N = channel groups, D = channels per group, ... = pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_cosmos.parallel.tokens import AutogradContext


class SplitGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with statistics over all ranks.

    Args:
        num_groups: Channel groups that this rank has a part of.
        num_channels: Channels of this rank.
        eps: Added to the variance.
        split_over: The process groups whose ranks hold the parts of these channel groups, one for each way of cutting.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float, split_over: Sequence[dist.ProcessGroup]) -> None:
        super().__init__(num_groups, num_channels, eps=eps)
        self.split_over = tuple(split_over)

    @classmethod
    def of(cls, norm: nn.GroupNorm, group: dist.ProcessGroup, *, cut_channels: bool = False) -> SplitGroupNorm:
        """Makes this rank's part of a norm, which may be split over other ranks already.

        Args:
            norm: What is split; left as it is.
            group: The ranks.
            cut_channels: Whether they divide the channels, of several channel groups whole ones; else the pixels.
        """
        over, num_groups = getattr(norm, "split_over", ()), norm.num_groups
        parts = group.size() if cut_channels else 1
        if cut_channels and num_groups > 1:
            num_groups //= parts
        else:
            over = (*over, group)
        made = cls(num_groups, norm.num_channels // parts, norm.eps, over)
        for own, whole in ((made.weight, norm.weight), (made.bias, norm.bias)):
            own.data = whole.detach().chunk(parts)[group.rank() if cut_channels else 0].clone()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] of this rank -> the same shape and dtype."""
        return _SplitGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.split_over)


class _SplitGroupNorm(torch.autograd.Function):
    """Keeps its input alone for the backward pass, as torch's own group norm does; both passes need one message."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        num_groups: int,
        eps: float,
        split_over: tuple[dist.ProcessGroup, ...],
    ) -> Tensor:
        x_BND = x.unflatten(1, (num_groups, -1)).float()
        mean, second_moment, count = _moments(x_BND)
        for group in split_over:
            mean, second_moment, count = _of_all_ranks(mean, second_moment, count, group)
        rstd = (second_moment / count + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.split_over = split_over
        scale, shift = (_per_channel(p, x_BND) for p in (weight, bias))
        return ((x_BND - mean) * rstd * scale + shift).flatten(1, 2).to(x.dtype)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        normed_BND = (x.unflatten(1, (mean.shape[1], -1)).float() - mean) * rstd
        grad_BND = grad.unflatten(1, (mean.shape[1], -1)).float()
        pixels = tuple(range(3, grad_BND.ndim))
        # Sums over pixels serve the parameters and, once the channels of a group are added up, the input.
        per_channel = torch.stack([g.sum(pixels, keepdim=True) for g in (grad_BND, grad_BND * normed_BND)])
        grad_bias, grad_weight = per_channel.sum(1).flatten(1).to(weight.dtype)
        scale = _per_channel(weight, grad_BND)
        sums = (per_channel * scale).sum(3, keepdim=True).contiguous()
        for group in ctx.split_over:
            dist.all_reduce(sums, group=group)
        along_mean, along_spread = sums / count
        grad_x = (grad_BND * scale - along_mean - normed_BND * along_spread) * rstd
        return grad_x.flatten(1, 2).to(x.dtype), grad_weight, grad_bias, None, None, None


def _moments(x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared distances from it, and number, per sample and channel group; [B, N, 1, ...]."""
    inside = tuple(range(2, x_BND.ndim))
    variance, mean = torch.var_mean(x_BND, inside, correction=0, keepdim=True)
    count = torch.full_like(mean, x_BND[0, 0].numel())
    return mean, variance * count, count


def _of_all_ranks(
    mean: Tensor, second_moment: Tensor, count: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Combines the ranks' moments without ever subtracting large sums.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    own = torch.stack([mean, second_moment, count]).contiguous()
    all_ranks = own.new_empty(group.size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(all_ranks, own, group=group)
    means, second_moments, counts = all_ranks.unflatten(0, (group.size(), -1)).unbind(1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    return mean, (second_moments + counts * (means - mean).square()).sum(0), count


def _per_channel(parameter: Tensor, x_BND: Tensor) -> Tensor:
    """[C] -> [N, D, 1, ...], to be multiplied with [B, N, D, ...]."""
    return parameter.float().reshape(*x_BND.shape[1:3], *[1] * (x_BND.ndim - 3))
