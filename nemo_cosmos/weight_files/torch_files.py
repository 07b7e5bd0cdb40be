"""`.pt` files of weights, read and written one tensor at a time; pickled code is never run.

A `.pt` file is a zip: `data.pkl` pickles the containers and, for each tensor, where it lies; `data/<key>` hold the
bytes. Source: https://pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.safetensors_files import write_values
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights

_MOST_MAPPED_BYTES = 1 << 24
"""What is mapped and was read counts as memory of the process, so the file is mapped anew after so much of it."""
_ALIGNMENT = 64
"""Bytes to which torch aligns tensors in the zip."""
_LOCAL_HEADER_BYTES = 30
"""Of a zip's entry, before its name."""
_ROOT = "archive"
"""Folder inside the zip; torch finds any."""
_FORMAT_VERSION = b"3\n"

_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.bool: torch.BoolStorage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int16: torch.ShortStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
}


def open_pt(path: Path) -> Weights:
    """Opens a `.pt` file: tensors by name, or one of the reference's training checkpoints.

    Of the latter the averaged weights stand for the trained ones, where it has them. TransformerEngine's extra states
    and the reference's counters, which are no weights, are left out.

    Raises:
        UserError: The file is missing, broken, or holds other objects than tensors in plain containers.
    """
    file = _MappedFile(path)
    return {
        name: StoredTensor(shape=tensor.shape, dtype=tensor.dtype, read=_Reader(file, name))
        for name, tensor in file.tensors().items()
    }


@dataclass(frozen=True)
class _Reader:
    file: _MappedFile
    name: str

    def __call__(self) -> torch.Tensor:
        return self.file.read(self.name)


class _MappedFile:
    """Maps a `.pt` file into memory, a stretch at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes_left = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, of which no byte has been read."""
        return _weights_in(_load_mapped(self._path), self._path)

    def read(self, name: str) -> torch.Tensor:
        """Gives a copy of one tensor."""
        if self._bytes_left <= 0:
            self._tensors = {}  # the old mapping ends before the new one begins
            self._tensors, self._bytes_left = self.tensors(), _MOST_MAPPED_BYTES
        tensor = self._tensors[name]
        self._bytes_left -= tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)


def _load_mapped(path: Path) -> Any:  # noqa: ANN401 - whatever plain containers the file holds
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        # TransformerEngine pickles its extra states into byte streams, which nobody reads here.
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the restricted unpickler raises whatever it stumbles over
        raise UserError(
            f"{path}: not a whole .pt file of plain tensors ({error}). Pickled objects are not run; save the model's "
            "state_dict() with torch.save, or convert it to safetensors where it comes from."
        ) from error


def _weights_in(content: Any, path: Path) -> dict[str, torch.Tensor]:  # noqa: ANN401 - whatever the file holds
    """The state dict in the file, or inside a training checkpoint."""
    while isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        # The reference's averages are buffers, whose names may hold no dots; those of its sharded training have them.
        averages = {name.replace("-", "."): weight for name, weight in (content.get("ema") or {}).items()}
        content = {**content["model"], **averages}
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors by name. Save that.")
    weights = {
        name: weight
        for name, weight in content.items()
        if name != "trained_data_record" and not name.endswith("_extra_state")
    }
    others = sorted(str(name) for name, weight in weights.items() if not isinstance(weight, torch.Tensor))
    if others:
        raise UserError(f"{path}: {others[:4]} are no tensors, expected a dict of tensors by name. Save that.")
    return weights


@dataclass(frozen=True)
class _Storage:
    key: str
    weight: StoredTensor


class _Tensor:
    """Pickles as a tensor that lies in a storage of its own."""

    def __init__(self, storage: _Storage) -> None:
        self._storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = tuple(self._storage.weight.shape)
        # A tensor on "meta" has the strides of a contiguous one and no bytes.
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self._storage, 0, shape, stride, False, OrderedDict())  # noqa: SLF001 - the name that the format demands


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", _STORAGES[obj.weight.dtype], obj.key, "cpu", obj.weight.shape.numel())


def write_pt(path: Path, weights: Weights) -> None:
    """Writes what `torch.save` would write of a dict of tensors, holding one tensor at a time.

    Args:
        path: The file; the caller writes aside and renames.
        weights: What to write.

    Raises:
        UserError: A tensor has a type that the reference does not read.
    """
    foreign = sorted({str(weight.dtype) for weight in weights.values() if weight.dtype not in _STORAGES})
    if foreign:
        raise UserError(f"{path}: .pt files here hold no {foreign}. Cast them: --dtype.")
    storages = {name: _Storage(str(index), weight) for index, (name, weight) in enumerate(weights.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({name: _Tensor(storage) for name, storage in storages.items()})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # A bare ZipInfo has no time of day: equal weights give equal files.
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), pickled.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder"), b"little")
        for storage in storages.values():
            _write_storage(archive, storage)
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version"), _FORMAT_VERSION)


def _write_storage(archive: zipfile.ZipFile, storage: _Storage) -> None:
    entry = zipfile.ZipInfo(f"{_ROOT}/data/{storage.key}")
    entry.file_size = storage.weight.nbytes
    # An extra field of its own kind, "FB" as torch calls it, holds the padding; its head takes four bytes.
    padding = -(archive.fp.tell() + _LOCAL_HEADER_BYTES + len(entry.filename) + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(entry, "w") as file:
        write_values(file, storage.weight)
