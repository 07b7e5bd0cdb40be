"""Splitting the token axis over ranks, and putting it together again, with exact gradients.

Letters: S = tokens of the whole sequence, s = tokens of this rank, B = batch, D = channels.

A sequence is cut into contiguous pieces: first over the context-parallel ranks, then, with sequence parallelism, each
piece over the tensor-parallel ranks.

**The loss convention of this project.** A model gathers its output, so that every tensor- and context-parallel rank
holds the whole prediction, and every rank computes the same loss: the mean over all tokens, as one rank would. The
backward pass of `gather_tokens` hands each rank the gradient of its own tokens only, so the parameter gradients of the
ranks are parts whose *sum* is the true gradient. Megatron's schedule multiplies a two-valued loss by the
context-parallel size and DDP averages over data- and context-parallel ranks, which together is that sum. A step
function therefore returns the plain loss with no factor of its own, and needs no reduction over context-parallel ranks
to report it. What does not pass through `gather_tokens` (a term computed alike on every rank from parameters) would be
counted once per context-parallel rank: wrap it in `count_once`.

**Images.** A picture has few tokens: cutting them costs more than it saves. Context-parallel ranks then share the
samples of a batch instead (`share_samples`), each computing its own ones as a single rank would (`without_context`);
`join_samples` makes the whole batch of them again on every rank, so that the loss is the same and so is the convention.

**Causal sequences.** The later a token, the more keys it sees: of contiguous pieces the last would cost most. Here each
of n ranks holds two of 2 n chunks, one from the front and one from the end (`CausalShard`), which balances the load,
and is how TransformerEngine has them. A sequence is put into that order before it is split (`zigzag`) and back into its
own after it is gathered (`natural_order`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_cosmos.errors import user_error

AutogradContext = Any
"""What torch hands from a forward to its backward pass; any attribute may be set on it."""


@dataclass(frozen=True)
class TokenShard:
    """The piece [start, stop) of a sequence of `total` tokens that this rank computes."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        """Number of tokens of this rank."""
        return self.stop - self.start


def token_shard(total: int, groups: ProcessGroupCollection, *, sequence_parallel: bool) -> TokenShard:
    """Finds this rank's piece of a sequence.

    Args:
        total: Tokens in the whole sequence.
        groups: Process groups; `cp` and `tp` are used.
        sequence_parallel: Whether the tensor-parallel ranks split the tokens too.

    Raises:
        UserError: The tokens cannot be cut into equal pieces.
    """
    parts, index = groups.cp.size(), groups.cp.rank()
    if sequence_parallel:
        parts, index = parts * groups.tp.size(), index * groups.tp.size() + groups.tp.rank()
    if total % parts:
        raise user_error(
            "num_tokens",
            total,
            f"a multiple of {parts} (context-parallel size times, with sequence parallelism, tensor-parallel size)",
            "Change the video's size or length, or use fewer ranks.",
        )
    length = total // parts
    return TokenShard(index * length, (index + 1) * length, total)


def split_tokens(x_SBD: torch.Tensor, groups: ProcessGroupCollection, *, sequence_parallel: bool) -> torch.Tensor:
    """Takes this rank's piece of the token axis (axis 0). The backward pass gathers the gradient of all pieces."""
    x_SBD = _Split.apply(x_SBD, groups.cp)
    return _Split.apply(x_SBD, groups.tp) if sequence_parallel else x_SBD


def gather_tokens(x_sBD: torch.Tensor, groups: ProcessGroupCollection, *, sequence_parallel: bool) -> torch.Tensor:
    """Joins the pieces of all ranks along axis 0. The backward pass takes this rank's piece of the gradient."""
    x_sBD = _Gather.apply(x_sBD, groups.tp) if sequence_parallel else x_sBD
    return _Gather.apply(x_sBD, groups.cp)


@dataclass(frozen=True)
class CausalShard:
    """The tokens of a causal sequence of `total` tokens that one of `size` context-parallel ranks computes."""

    total: int
    rank: int = 0
    size: int = 1

    def __len__(self) -> int:
        """Number of tokens of this rank."""
        return self.total // self.size

    def positions(self, device: torch.device) -> torch.Tensor:
        """Where they stand in the sequence; int64 [s], ascending."""
        return zigzag(torch.arange(self.total, device=device), self.size).chunk(self.size)[self.rank]


def causal_shard(total: int, groups: ProcessGroupCollection, *, sequence_parallel: bool) -> CausalShard:
    """Finds this rank's tokens of a causal sequence.

    Args:
        total: Tokens in the whole sequence.
        groups: Process groups; `cp` and, with sequence parallelism, `tp` are used.
        sequence_parallel: Whether the tensor-parallel ranks split each rank's tokens once more.

    Raises:
        UserError: The tokens cannot be cut into equal chunks.
    """
    unit = causal_unit(groups.cp.size(), groups.tp.size() if sequence_parallel else 1)
    if total % unit:
        raise user_error(
            "num_tokens",
            total,
            f"a multiple of {unit} (twice the context-parallel size, and with sequence parallelism of the product with "
            "the tensor-parallel size)",
            "Pad the sequence, change the video's size or length, or use fewer ranks.",
        )
    return CausalShard(total, groups.cp.rank(), groups.cp.size())


def causal_unit(context: int, tensor: int) -> int:
    """What the number of tokens of a causal sequence must be a multiple of.

    Args:
        context: Context-parallel size.
        tensor: Size of the tensor-parallel group that splits the tokens; 1 without sequence parallelism.
    """
    return math.lcm(2 * context, context * tensor) if context > 1 else tensor


def zigzag(x_S: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Puts a sequence (axis 0) into the order in which contiguous pieces are those of `CausalShard`."""
    if num_ranks == 1:
        return x_S
    chunks = x_S.chunk(2 * num_ranks)
    return torch.cat([chunk for rank in range(num_ranks) for chunk in (chunks[rank], chunks[-1 - rank])])


def natural_order(x_S: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The inverse of `zigzag`."""
    if num_ranks == 1:
        return x_S
    chunks = x_S.chunk(2 * num_ranks)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])


class SingleRank:
    """Stands for a process group of this rank alone."""

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0


def without_context(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """Returns the groups of a model whose context-parallel ranks each work on samples of their own."""
    return ProcessGroupCollection(tp=groups.tp, pp=groups.pp, cp=SingleRank())


def share_samples(x_B: Any, num_samples: int, group: dist.ProcessGroup) -> Any:  # noqa: ANN401 - what is no batch stays
    """Takes this rank's samples of a batch, where the ranks divide them; all of them where they do not.

    Args:
        x_B: An input without gradient, samples on axis 0. What is no tensor, or holds one value for all samples, stays.
        num_samples: B.
        group: The ranks that share the batch.
    """
    of_samples = isinstance(x_B, torch.Tensor) and x_B.ndim > 0 and len(x_B) == num_samples
    return _own_piece(x_B, group) if of_samples and num_samples % group.size() == 0 else x_B


def join_samples(x_B: torch.Tensor, num_samples: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Joins what the ranks made of their `share_samples`; the ranks' gradients add up to the true ones."""
    return count_once(x_B, group) if num_samples % group.size() else _Gather.apply(x_B, group)


def count_once(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns `x`; its gradient is divided by the group's size, so that the ranks' gradients add up to the true one."""
    return _ScaleGradient.apply(x, 1 / group.size()) if group.size() > 1 else x


def all_gather_first_axis(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Joins all ranks' tensors along axis 0, in rank order; not differentiable."""
    if group.size() == 1:
        return x
    joined = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(joined, x.contiguous(), group=group)
    return joined


def _own_piece(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(group.size(), dim=0)[group.rank()].contiguous()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _own_piece(x, group)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_first_axis(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather_first_axis(x, group)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_piece(grad, ctx.group), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None
