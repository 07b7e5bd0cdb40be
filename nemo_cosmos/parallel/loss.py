"""Losses across ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction

from nemo_cosmos.parallel.device import current_device


class MeanLossReduction(MegatronLossReduction):
    """Base of the project's losses: the logged value is the mean over micro-batches and data-parallel ranks.

    A subclass's `forward(batch, forward_out)` returns the micro-batch's mean loss and a dict whose entry `avg` is that
    loss, detached, with shape [1].
    """

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Averages `avg`; gives zero on pipeline stages that compute no loss."""
        if not losses_reduced_per_micro_batch:
            return torch.zeros((), device=current_device())
        loss = torch.cat([entry["avg"] for entry in losses_reduced_per_micro_batch]).mean()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
        return loss
