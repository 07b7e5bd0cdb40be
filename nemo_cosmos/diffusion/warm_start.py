"""Starting a run from whole weights, in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from nemo_cosmos.diffusion.initialization import tensor_parallel_axis
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.transformer import weights

ACTION_LAYERS = ("conditioning.action_embedder",)
"""Prefix of the layers that a base model may lack; they keep their first values, which leave the base unchanged."""


def load_whole_weights(model: CosmosDiT, path: str | Path, *, may_lack: tuple[str, ...] = ()) -> None:
    """Copies this rank's share of a safetensors file of whole weights, one weight at a time.

    Args:
        model: This rank's part of the network.
        path: Weights under our names, as one rank holds them; or their address on the hub.
        may_lack: Prefixes of names that may be absent; such weights keep their values.

    Raises:
        UserError: The file is missing, or a weight is missing or of another shape.
    """
    weights.load_whole_weights(model.global_tensors(), path, _own(model), may_lack=may_lack)


def copy_whole_weights(
    model: CosmosDiT,
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    *,
    source: str,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Copies this rank's share of whole weights, one weight at a time.

    Args:
        model: This rank's part of the network.
        names: Of the weights that are there, under our names.
        read: Gives a weight by its name, as one rank holds it.
        source: Where they are from, for errors.
        may_lack: Prefixes of names that may be absent; such weights keep their values.

    Raises:
        UserError: A weight is missing or of another shape.
    """
    weights.copy_whole_weights(
        model.global_tensors(),
        names,
        read,
        _own(model),
        source=source,
        may_lack=may_lack,
    )


def _own(model: CosmosDiT) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, whole: weights.own_part(whole, tensor_parallel_axis(name), model.groups.tp)
