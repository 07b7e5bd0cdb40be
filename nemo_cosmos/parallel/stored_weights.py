"""What a distributed checkpoint holds, read without process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_cosmos.errors import UserError

PREFIX = "module."
"""Put before every name in checkpoints: the LightningModule's attribute that holds the Megatron module."""

WEIGHTS, EMA = "weights", "ema"
"""Folders of a checkpoint: NeMo's own, and the averaged weights of the `EMA` callback."""


def is_nemo(folder: Path) -> bool:
    """Tells whether a folder holds a NeMo checkpoint."""
    return (folder / WEIGHTS / "metadata.json").is_file()


def is_stored(folder: Path) -> bool:
    """Tells whether a folder holds a distributed checkpoint whose writing was finished."""
    return (folder / ".metadata").is_file()


def weights_folder(saved: Path, *, use_ema: bool) -> Path:
    """Returns the folder of a model checkpoint that holds the averaged weights, or the trained ones.

    Args:
        saved: Folder of the checkpoint.
        use_ema: Prefer the averaged weights, where the checkpoint has them.

    Raises:
        UserError: There is no whole checkpoint.
    """
    names = (EMA, WEIGHTS) if use_ema else (WEIGHTS,)
    for folder in (saved / name for name in names):
        if is_stored(folder):
            return folder
    raise UserError(f"{saved}: holds no whole checkpoint. Give a folder like run/checkpoints/step=0001000.")


def read_whole(saved: str | Path, *, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Reads a model checkpoint's whole weights, without building the model.

    Args:
        saved: Folder of a checkpoint.
        use_ema: Take the averaged weights where the checkpoint has them.

    Returns:
        Tensors under the module's own names; optimizer states and the extra states of layers are left out.

    Raises:
        UserError: There is no whole checkpoint.
    """
    folder = weights_folder(Path(saved), use_ema=use_ema)
    dtypes = stored_dtypes(folder)
    wanted = {
        name: torch.empty(shape, dtype=dtypes[name])
        for name, shape in stored_shapes(folder).items()
        if name.startswith(PREFIX) and name in dtypes
    }
    read_whole_tensors(wanted, folder)
    return {name.removeprefix(PREFIX): value for name, value in wanted.items()}


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors in a distributed checkpoint."""
    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}


def read_whole_tensors(into: dict[str, torch.Tensor], folder: Path) -> None:
    """Fills tensors, by name, with what a distributed checkpoint holds; each must have its whole shape."""
    checkpoint.load(into, storage_reader=checkpoint.FileSystemReader(folder), no_dist=True)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Names and types of the tensors in a distributed checkpoint."""
    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: e.properties.dtype for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}
