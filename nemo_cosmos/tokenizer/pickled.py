"""Reading `.pt` files of others; pickled code is never run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError


def load_pt(path: Path) -> Any:  # noqa: ANN401 - whatever plain containers the file holds
    """Reads a `.pt` file of tensors in plain containers; pickled code is never run.

    Raises:
        UserError: The file is missing, broken, or holds other objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises whatever it stumbles over
        raise UserError(
            f"{path}: not a file of plain tensors ({error}). Pickled objects are not run; convert it to safetensors."
        ) from error


def read_pt(path: Path) -> dict[str, Tensor]:
    """Reads a state dict: a `.pt` file of tensors by name, or one of the reference's training checkpoints.

    Of the latter the averaged weights are taken, as the published `.jit` files hold them, and the trained ones where
    there are no averages.

    Raises:
        UserError: The file is missing, broken, or holds more than tensors.
    """
    tensors = load_pt(path)
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = _trained(tensors["model"])
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors by name. Save the model's `state_dict()`.")
    return tensors


def _trained(model: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the network's own names; the averages stand under theirs with `-` for every dot."""
    averages = {
        name.removeprefix("ema.").replace("-", "."): weight for name, weight in model.items() if name.startswith("ema.")
    }
    weights = {name: weight for name, weight in model.items() if not name.startswith("ema.")} | averages
    return {name.removeprefix("network."): weight for name, weight in weights.items()}
