"""A rank's share of whole weights: how it is cut, drawn for the first time, and copied from a file.

Each weight is drawn whole from a generator seeded by the run's seed and the weight's name, then cut: so a model on many
ranks starts where a model on one rank starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.pieces import ProcessGroup
from nemo_cosmos.weight_files.hub import local_path


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator of a weight's first values.

    Args:
        seed: Of the model.
        name: Of the weight, as one rank has it.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def own_part(whole: torch.Tensor, axis: int | None, group: ProcessGroup, *, num_layers: int = 1) -> torch.Tensor:
    """What this rank holds of a whole weight.

    Args:
        whole: The weight.
        axis: Along which the ranks split it; None where each holds it whole.
        group: The tensor-parallel ranks.
        num_layers: Layers that stand one after the other along `axis`, each of which is split by itself.
    """
    if axis is None or group.size() == 1:
        return whole
    layers = whole.chunk(num_layers, dim=axis)
    return torch.cat([layer.chunk(group.size(), dim=axis)[group.rank()] for layer in layers], dim=axis)


@torch.no_grad()
def copy_whole_weights(
    named: Iterable[tuple[str, torch.Tensor]],
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    own: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    source: str,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Copies this rank's share of whole weights, one weight at a time.

    Args:
        named: This rank's tensors under the names they have on one rank.
        names: Of the weights that are there, under the same names.
        read: Gives a weight by its name, as one rank holds it.
        own: Gives this rank's share of a weight by its name and whole values.
        source: Where they are from, for errors.
        may_lack: Prefixes of names that may be absent; such weights keep their values.

    Raises:
        UserError: A weight is missing or of another shape.
    """
    there = set(names)
    for name, tensor in named:
        if name not in there:
            if name.startswith(may_lack):
                continue
            raise UserError(
                f"{source}: weight {name} is missing, expected {list(tensor.shape)} on this rank. "
                "Give weights of the same architecture."
            )
        whole = read(name)
        part = own(name, whole)
        if part.shape != tensor.shape:
            raise UserError(
                f"{source}: weight {name} has shape {list(whole.shape)}, this rank's share would be "
                f"{list(part.shape)}, expected {list(tensor.shape)}. Give weights of the same architecture."
            )
        tensor.copy_(part)


def load_whole_weights(
    named: Iterable[tuple[str, torch.Tensor]],
    path: str | Path,
    own: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Copies this rank's share of a safetensors file of whole weights, one weight at a time.

    Args:
        named: As for `copy_whole_weights`.
        path: Weights under our names, as one rank holds them; or their address on the hub.
        own: As for `copy_whole_weights`.
        may_lack: As for `copy_whole_weights`.

    Raises:
        UserError: The file is missing, or a weight is missing or of another shape.
    """
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give a .safetensors file of whole weights.")
    with safe_open(path, framework="pt") as file:
        copy_whole_weights(named, file.keys(), file.get_tensor, own, source=str(path), may_lack=may_lack)
