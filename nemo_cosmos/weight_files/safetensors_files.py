"""Safetensors files, read and written one tensor at a time.

The library reads single tensors but writes only what is all in memory; the format is one header and the tensors' bytes:
https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights

_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
"""Bytes to which the header is padded, so that the tensors behind it are aligned."""


def open_safetensors(path: Path) -> Weights:
    """Opens a safetensors file.

    Raises:
        UserError: It is missing or broken, or holds a type that no weight has.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path, or run the step that writes it.")
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            kinds = {name: (torch.Size(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Fetch or write it again.") from error
    unknown = sorted({kind for _, kind in kinds.values()} - _DTYPES.keys())
    if unknown:
        raise UserError(f"{path}: holds tensors of types {unknown}, expected {sorted(_DTYPES)}. Convert it elsewhere.")
    return {
        name: StoredTensor(shape=shape, dtype=_DTYPES[kind], read=_Reader(path, name))
        for name, (shape, kind) in kinds.items()
    }


class _Reader:
    """Reads one tensor; the file is mapped only meanwhile, since what is mapped and was read counts as memory."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __call__(self) -> torch.Tensor:
        with safe_open(str(self._path), framework="pt") as file:
            return file.get_tensor(self._name).clone()


def open_shards(folder: Path, name: str) -> Weights:
    """Opens one safetensors file of a folder, or the shards that its `.index.json` lists.

    Args:
        folder: Where.
        name: The file's name where it stands alone, such as `diffusion_pytorch_model.safetensors`.

    Raises:
        UserError: A file is missing or broken, or lacks a tensor that the index finds there.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return open_safetensors(folder / name)
    places: dict[str, str] = read_json(index)["weight_map"]
    files = {file: open_safetensors(folder / file) for file in sorted(set(places.values()))}
    lacking = sorted(tensor for tensor, file in places.items() if tensor not in files[file])
    if lacking:
        raise UserError(f"{index}: lists {lacking[:4]}, which the files do not hold. Fetch them again.")
    return {tensor: files[file][tensor] for tensor, file in places.items()}


def write_safetensors(path: Path, weights: Weights) -> None:
    """Writes a safetensors file as the library does, holding one tensor at a time.

    Args:
        path: The file; the caller writes aside and renames.
        weights: What to write.

    Raises:
        UserError: A tensor has a type that the format lacks.
    """
    foreign = sorted({str(weight.dtype) for weight in weights.values() if weight.dtype not in _NAMES})
    if foreign:
        raise UserError(f"{path}: safetensors here hold no {foreign}. Cast them: --dtype.")
    # Widest type first, as the library orders them: so each tensor begins at a multiple of its type's size.
    names = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        weight = weights[name]
        start, end = end, end + weight.nbytes
        header[name] = {"dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            write_values(file, weights[name])


def write_values(file: BinaryIO, weight: StoredTensor) -> None:
    """Writes a tensor's bytes, row by row in the machine's own (little-endian) order."""
    values = weight.read()
    assert (values.shape, values.dtype) == (weight.shape, weight.dtype), (values.shape, values.dtype, weight)
    file.write(values.detach().contiguous().flatten().view(torch.uint8).numpy())


def write_shards(folder: Path, name: str, weights: Weights, *, max_shard_size: str) -> None:
    """Writes one safetensors file, or several with an index as diffusers and transformers read them.

    Args:
        folder: Where; it exists.
        name: The file's name where it stands alone.
        weights: What to write.
        max_shard_size: Most bytes of a file, such as "5GB".

    Raises:
        UserError: A tensor has a type that the format lacks.
    """
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.nbytes,
        filename_pattern=f"{name.removesuffix('.safetensors')}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {key: weights[key] for key in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{name}.index.json", index)
