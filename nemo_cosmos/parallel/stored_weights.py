"""What a distributed checkpoint holds, read without process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def is_stored(folder: Path) -> bool:
    """Tells whether a folder holds a distributed checkpoint whose writing was finished."""
    return (folder / ".metadata").is_file()


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
