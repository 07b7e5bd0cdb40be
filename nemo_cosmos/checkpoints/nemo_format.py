"""NeMo checkpoints from whole weights, and whole weights from NeMo checkpoints, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import (
    PREFIX,
    WEIGHTS,
    read_whole_tensors,
    stored_dtypes,
    stored_shapes,
    weights_folder,
)
from nemo_cosmos.parallel.weight_by_weight import WeightByWeight
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights


def open_weights(saved: Path) -> Weights:
    """Opens whole weights under our names, averaged ones where the checkpoint has them.

    Args:
        saved: Folder of a checkpoint.

    Raises:
        UserError: There is no whole checkpoint.
    """
    folder = weights_folder(saved, use_ema=True)
    shapes = stored_shapes(folder)
    return {
        name.removeprefix(PREFIX): StoredTensor(
            shape=shapes[name], dtype=dtype, read=partial(_read, folder, name, shapes[name], dtype)
        )
        for name, dtype in stored_dtypes(folder).items()
        if name.startswith(PREFIX)
    }


def _read(folder: Path, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype)
    read_whole_tensors({name: values}, folder)
    return values


def save(weights: Weights, card: CheckpointCard, folder: Path, *, describe: Callable[[], ShardedStateDict]) -> None:
    """Writes a Megatron distributed checkpoint in NeMo's layout, of weights as they are, and its card.

    Args:
        weights: Whole, under our names; exactly those of the model.
        card: Of the model.
        folder: Where; an older one is replaced.
        describe: Gives the model's sharded state dict under names with `PREFIX`, of tensors that may be on the meta
            device. It is called while Megatron's process groups are open.
    """
    strategy = WeightByWeight({PREFIX + name: weight for name, weight in weights.items()})
    with initialize(), written_aside(folder) as aside:
        (aside / WEIGHTS).mkdir(parents=True)
        dist_checkpointing.save({"state_dict": describe()}, str(aside / WEIGHTS), sharded_strategy=strategy)
        write_json(aside / "card.json", card.to_dict())
