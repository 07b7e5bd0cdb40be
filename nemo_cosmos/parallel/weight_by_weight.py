"""Writing a Megatron distributed checkpoint from one process with one weight in memory at a time."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_cosmos.weight_files.stored_tensor import Weights


class WeightByWeight(SaveShardedStrategy):
    """Saves what Megatron's own strategy saves, which wants all tensors in memory and copies them there once more.

    Args:
        weights: By their keys in the checkpoint; the tensors of the state dict that is saved tell only their keys.
    """

    can_handle_sharded_objects = True

    def __init__(self, weights: Weights) -> None:
        super().__init__("torch_dist", 1)
        self._weights = weights

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Writes a file for each weight: torch keeps what it writes into one file until that is closed."""
        checkpoint.save(
            dict(map(self._room, nested_values(sharded_state_dict))),
            storage_writer=checkpoint.FileSystemWriter(checkpoint_dir, single_file_per_rank=False),
            planner=_Planner(self._weights),
        )

    def _room(self, entry: ShardedTensor | ShardedObject) -> tuple[str, torch.Tensor | io.BytesIO]:
        """The key of an entry, and what tells torch to make room for it: a tensor without values, or bytes."""
        if isinstance(entry, ShardedObject):
            packed = io.BytesIO()
            torch.save([entry.data], packed)  # a list, as Megatron unpacks it
            return entry.unique_key, packed
        weight = self._weights[entry.key]
        return entry.key, torch.empty(weight.shape, dtype=weight.dtype, device="meta")


class _Planner(MCoreSavePlanner):
    """Reads a weight when its turn to be written has come."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights = weights

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor | io.BytesIO:
        """Finds what to write; torch asks for each entry once, one after the other."""
        return self._weights[index.fqn].read() if index.fqn in self._weights else super().lookup_object(index)
