"""The values of parameters that this rank's optimizer keeps up to date.

Megatron's distributed optimizer cuts parameters over the data-parallel ranks, and holds float32 masters of those that
the model has in 16 bits. Both are newer than the model's own copies while new values are still being gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.fsdp import local_shard


@dataclass(frozen=True, kw_only=True)
class MasterShard:
    """This rank's piece of one parameter, which may be empty."""

    values: torch.Tensor
    """Flat; float32 where the optimizer has masters, else as the model has it."""
    start: int
    """Place of the first value in the flattened parameter."""
    shape: torch.Size
    """Of the whole parameter, as this tensor- and pipeline-parallel rank has it."""
    group: dist.ProcessGroup | None
    """Ranks that hold the other pieces; None where this one holds all."""

    def join(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Puts the pieces of all ranks together; every rank of the group must call it.

        Args:
            piece: Shaped as `values`.

        Returns:
            The whole on the CPU, on the group's first rank; None on the others.
        """
        if self.group is None or self.group.size() == 1:
            return piece.reshape(self.shape).cpu()
        whole = self._padded(piece)
        dist.reduce(whole, group_dst=0, group=self.group)
        return whole.view(self.shape).cpu() if self.group.rank() == 0 else None

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """As `join`, but every rank gets the whole, on its device."""
        if self.group is None or self.group.size() == 1:
            return piece.reshape(self.shape)
        whole = self._padded(piece)
        dist.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def _padded(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole with zeros for what other ranks have: the sum over the ranks puts it together."""
        # On the device that collectives work on, wherever the optimizer keeps its masters.
        whole = torch.zeros(self.shape.numel(), dtype=piece.dtype, device=current_device())
        self.cut(whole).copy_(piece)
        return whole

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a whole parameter, flat; a view where that is contiguous."""
        return whole.reshape(-1)[self.start : self.start + self.values.numel()]


def master_shards(
    chunks: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[torch.Tensor, MasterShard]:
    """Finds this rank's piece of each parameter that is trained, in an order that all ranks share.

    Of fully sharded parameters this rank's shards stand for the whole, also as keys.

    Args:
        chunks: The model's, as Megatron wraps them.
        optimizers: NeMo's wrappers of Megatron's optimizers; parameters of others are taken whole from the model.
    """
    shards: dict[nn.Parameter, MasterShard] = {}
    for optimizer in optimizers:
        for distributed in _distributed(getattr(optimizer, "mcore_optimizer", None)):
            shards |= _shards_of(distributed)
    return {
        local_shard(parameter): shards.get(parameter) or _whole(parameter)
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad
    }


def _distributed(optimizer: object) -> Iterator[DistributedOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer and hasattr(part, "buffers"):
            yield part


def _shards_of(optimizer: DistributedOptimizer) -> dict[nn.Parameter, MasterShard]:
    values: dict[nn.Parameter, torch.Tensor] = {}
    for parameters, own in (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_float16_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    ):
        for group, own_of_group in zip(parameters, own, strict=True):
            for parameter, piece in zip(group, own_of_group, strict=True):
                if piece is not None:  # Adam may hold the masters itself
                    values[parameter] = piece.detach()
    shards = {}
    for buffer in optimizer.buffers:
        for parameter in buffer.params:
            piece = values.get(parameter)
            start = 0
            if piece is not None:
                start = optimizer._get_model_param_range_map(parameter)["param"].start  # noqa: SLF001 - Megatron's only way
            shards[parameter] = MasterShard(
                values=parameter.detach().new_empty(0) if piece is None else piece,
                start=start,
                shape=parameter.shape,
                group=optimizer.data_parallel_group,
            )
    return shards


def _whole(parameter: nn.Parameter) -> MasterShard:
    master = getattr(parameter, "main_param", None)  # set by Megatron's optimizer of 16-bit weights
    values = local_shard(parameter if master is None else master).detach()
    return MasterShard(values=values.view(-1), start=0, shape=values.shape, group=None)
