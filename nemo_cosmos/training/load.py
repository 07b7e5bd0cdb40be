"""Weights of a training checkpoint, into a bare module of any parallel layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import nn

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.stored_weights import PREFIX, read_whole_tensors, stored_shapes, weights_folder


def load_weights(
    module: nn.Module, checkpoint: str | Path, *, use_ema: bool = True, may_lack: tuple[str, ...] = ()
) -> None:
    """Copies a checkpoint's weights into a module, whatever layout it was saved in.

    Args:
        module: A Megatron module (this rank's part; process groups must be open), or a plain whole one.
        checkpoint: Folder of a checkpoint, such as `run/checkpoints/step=0001000`.
        use_ema: Take the averaged weights where the checkpoint has them.
        may_lack: Prefixes of names that the checkpoint may lack; such weights keep their values. Of a vocabulary of
            that name it may lack the last rows, which keep theirs.

    Raises:
        UserError: There is no whole checkpoint, or a weight is missing or of another shape.
    """
    folder = weights_folder(Path(checkpoint), use_ema=use_ema)
    stored = stored_shapes(folder)
    sharded = hasattr(module, "sharded_state_dict")
    wanted: dict[str, Any] = (
        module.sharded_state_dict(prefix=PREFIX)
        if sharded
        else {f"{PREFIX}{name}": value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    )
    lacking = tuple(PREFIX + name for name in may_lack)
    grown = {name: entry for name, entry in wanted.items() if _has_more_rows(entry, stored, lacking)}
    whole = {name: entry for name, entry in wanted.items() if name not in grown}
    for name, shape in list(_shapes(whole)):
        if name in stored:
            _check_shape(folder, name, stored[name], shape)
        elif not name.startswith(lacking):
            raise UserError(f"{folder}: weight {name} is missing. Give a checkpoint of the same architecture.")
    wanted = {
        name: entry
        for name, entry in wanted.items()
        if all(key in stored for key, _ in _shapes({name: entry}))
        and not (isinstance(entry, ShardedObject) and entry.key.startswith(lacking))  # extra states of absent layers
    }
    if sharded:
        first = {name: entry.data.detach().clone() for name, entry in grown.items()}
        wanted = dist_checkpointing.load(wanted, str(folder))
        for name, entry in grown.items():
            begin = max(stored[entry.key][0] - entry.global_offset[0], 0)
            with torch.no_grad():
                wanted[name][begin:] = first[name][begin:]  # Megatron has put zeros there
    else:
        read_whole_tensors(wanted, folder)
    module.load_state_dict({name.removeprefix(PREFIX): value for name, value in wanted.items()}, strict=False)


def _has_more_rows(entry: Any, stored: dict[str, torch.Size], lacking: tuple[str, ...]) -> bool:  # noqa: ANN401 - of a state
    """Whether this is a vocabulary of which the checkpoint lacks the last rows, and may."""
    if not isinstance(entry, ShardedTensor) or not entry.allow_shape_mismatch or not entry.key.startswith(lacking):
        return False
    rows, *rest = stored.get(entry.key, entry.global_shape)
    return rows < entry.global_shape[0] and tuple(rest) == tuple(entry.global_shape[1:])


def _shapes(wanted: dict[str, Any]) -> Iterator[tuple[str, torch.Size]]:
    """Names and whole shapes of what is to be loaded; extra states of layers, which hold no weights, are left out."""
    for entry in nested_values(wanted):
        if isinstance(entry, ShardedTensorFactory):
            yield from _shapes({"": entry.build()})
        elif isinstance(entry, ShardedTensor):
            yield entry.key, torch.Size(entry.global_shape)
        elif torch.is_tensor(entry):
            yield from ((name, value.shape) for name, value in wanted.items() if value is entry)


def _check_shape(folder: Path, name: str, got: torch.Size, expected: torch.Size) -> None:
    if got != expected:
        raise UserError(
            f"{folder}: weight {name} has shape {list(got)}, expected {list(expected)}. "
            "Give a checkpoint of the same architecture."
        )
