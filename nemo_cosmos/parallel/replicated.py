"""Modules that every data-parallel rank holds whole, outside of Megatron's own DDP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from nemo_cosmos.errors import user_error


def average_gradients(parameters: Iterable[nn.Parameter], *, num_micro_batches: int) -> None:
    """Turns gradients that were added up over micro-batches into the mean over these and the data-parallel ranks.

    Args:
        parameters: Of this rank's copy; those without a gradient are left out. The same on every rank.
        num_micro_batches: Of this rank; the same on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    ranks = dist.get_world_size(group)
    if ranks > 1:
        dist.all_reduce(flat, group=group)
    flat /= num_micro_batches * ranks
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def check_same_on_all_ranks(name: str, value: str) -> None:
    """Refuses a value that differs from rank to rank.

    Args:
        name: What it is.
        value: This rank's.

    Raises:
        UserError: Another rank has another value.
    """
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise user_error(name, values, "the same on all ranks", "Give all nodes the same files.")
