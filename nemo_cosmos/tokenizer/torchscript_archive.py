"""Weights out of a TorchScript archive without running anything that stands in it.

An archive is a zip: `data.pkl` pickles the tree of modules, `data/<key>` hold the tensors' bytes, and `code/` holds
programs. `torch.jit.load` compiles the programs; Python's unpickler would call whatever `data.pkl` names. Here `code/`
is never opened, and `data.pkl` is read by `_unpickled`, which knows only the opcodes that torch writes, calls nothing,
and copies nothing that the pickle refers to twice, so that a small file cannot fill the memory.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError

_SCRIPT_CLASSES = "__torch__"
"""Package of an archive's own classes; those of a `__main__` stand in it, all others in modules below it."""

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}

_TYPED_LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist", "restore_type_tag")
"""Functions of `torch.jit._pickle` that say of which type a list or dict is; their first argument is the value."""

_MOST_MEMORY = 4
"""Most bytes of all storages and tensors over those of the file. It is 2 where each weight has its own storage; tied
ones, which stand once in the file, may have the rest."""
_MOST_AXES = 64
"""torch's own limit."""
_LONGEST_NAME = 1000
"""Most characters of a tensor's dotted name."""


class _Name(NamedTuple):
    """A class or function that the pickle names; it is never imported."""

    module: str
    name: str

    @property
    def is_script_class(self) -> bool:
        """Whether it is a class of the archive itself."""
        return self.module == _SCRIPT_CLASSES or self.module.startswith(f"{_SCRIPT_CLASSES}.")


@dataclass(eq=False)
class _Module:
    """A pickled module; it has attributes and no behaviour."""

    attributes: dict[Any, Any] = field(default_factory=dict)


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _TensorRecord(NamedTuple):
    """What a tensor is cut out of a storage by; in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a TorchScript archive by their dotted names, as stored, on the CPU.

    Args:
        path: What `torch.jit.save` wrote, such as `encoder.jit`.

    Returns:
        Parameters and buffers of the module and of all modules inside it. A module that stands in several places is
        found in the first alone, as `named_parameters` does. Constants of its programs are left out.

    Raises:
        UserError: The file is missing or broken, its pickle holds anything that is not needed for tensors, or its
            tensors are much larger than the file; nothing of it has been run then.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            if f"{root}byteorder" in archive.namelist() and _record(archive, f"{root}byteorder") != b"little":
                raise UserError("its tensors are not little-endian. Write it again on another machine.")
            module = _unpickled(_record(archive, f"{root}data.pkl"))
            tensors = _Tensors(archive, root, _MOST_MEMORY * path.stat().st_size)
            return {name: tensors.read(record) for name, record in _records(module, "", set())}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # anything may be wrong in a broken file; its content is kept out of the message
        raise UserError(
            f"{path}: not a whole TorchScript archive ({type(error).__name__}). Fetch or write it again."
        ) from error


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the zip that holds everything."""
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if not roots:
        raise UserError("holds no data.pkl, so it is no TorchScript archive. Fetch or write it again.")
    if len(roots) > 1:
        raise UserError(f"holds {len(roots)} data.pkl, where torch writes one. Fetch or write it again.")
    return roots[0]


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        # torch stores these uncompressed; a compressed one might unfold to more than the memory holds.
        raise UserError(f"{name} is compressed, as torch never writes it. Do not trust this file.")
    return archive.read(info)


def _unpickled(pickled: bytes) -> Any:  # noqa: ANN401, C901, PLR0915 - one case per opcode
    """Runs the stack machine of `torch/csrc/jit/serialization/pickler.cpp` on records that do nothing.

    Python's own unpickler would do more than is wanted: it allocates its memo up to the largest index, hashes nested
    tuples, copies states into objects, and calls their `__setstate__`.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def taken(start: int) -> list[Any]:
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(taken(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken(-int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                values = taken(-1 if opcode.name == "APPEND" else marks.pop())
                _expect(isinstance(stack[-1], list))
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                values = taken(-2 if opcode.name == "SETITEM" else marks.pop())
                # Other keys cost time to hash.
                _expect(isinstance(stack[-1], dict) and all(isinstance(key, str | int | float) for key in values[::2]))
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "NEWOBJ":
                cls, arguments = taken(-2)
                _expect(isinstance(cls, _Name) and cls.is_script_class and arguments == ())
                stack.append(_Module())
            case "REDUCE":
                stack.append(_result(*taken(-2)))
            case "BUILD":
                state = stack.pop()
                _expect(isinstance(stack[-1], _Module) and isinstance(state, dict))
                stack[-1].attributes = state
            case other:
                raise UserError(f"data.pkl holds the opcode {other}, which torch never writes. Do not trust this file.")
    raise AssertionError("genops ends with STOP, or raises")


def _expect(holds: bool) -> None:
    if not holds:
        raise UserError("data.pkl is not as torch writes it; nothing was run. Do not trust this file.")


def _name(module: str, name: str) -> _Name:
    """Refuses everything that is not needed for tensors."""
    found = _Name(module, name)
    known = (
        found.is_script_class
        or found in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"))
        or (module == "torch" and name in _DTYPES)
        or (module == "torch.jit._pickle" and name in _TYPED_LISTS)
    )
    if not known:
        named = f"{module}.{name}"[:100]
        raise UserError(f"data.pkl names {named}, which no tensor needs; nothing was run. Do not trust this file.")
    return found


def _storage(pid: Any) -> _Storage:  # noqa: ANN401 - whatever the pickle holds
    _expect(isinstance(pid, tuple) and len(pid) == 5)
    kind, dtype, key, _, _ = pid
    _expect(isinstance(kind, str) and kind == "storage" and isinstance(key, str))
    _expect(isinstance(dtype, _Name) and dtype.name in _DTYPES)
    return _Storage(key, _DTYPES[dtype.name])


def _result(function: Any, arguments: Any) -> Any:  # noqa: ANN401 - whatever the pickle holds
    """What a call stands for."""
    _expect(isinstance(function, _Name) and isinstance(arguments, tuple))
    if function.name == "_rebuild_tensor_v2":
        _expect(len(arguments) >= 4)
        storage, offset, size, stride = arguments[:4]
        _expect(isinstance(storage, _Storage) and type(offset) is int and _are_ints(size) and _are_ints(stride))
        _expect(len(size) == len(stride))
        return _TensorRecord(storage, offset, size, stride)
    if function.name == "OrderedDict":
        # The hooks of a tensor, of which there are none.
        _expect(not arguments)
        return {}
    _expect(function.module == "torch.jit._pickle" and len(arguments) > 0)
    return arguments[0]


def _are_ints(values: Any) -> bool:  # noqa: ANN401 - whatever the pickle holds
    return isinstance(values, tuple) and len(values) <= _MOST_AXES and all(type(value) is int for value in values)


class _Tensors:
    """Makes tensors of records.

    Args:
        archive: The open zip.
        root: Folder inside it.
        most_bytes: Most that all storages and tensors may have together.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, most_bytes: int) -> None:
        self._archive, self._root, self._bytes_left = archive, root, most_bytes
        self._storages: dict[_Storage, Tensor] = {}

    def read(self, record: _TensorRecord) -> Tensor:
        """Gives a tensor that shares nothing."""
        storage = self._stored(record.storage)
        num_elements = math.prod(record.size)
        if num_elements:
            last = sum((n - 1) * step for n, step in zip(record.size, record.stride, strict=True))
            fits = min((*record.size, record.offset, *record.stride)) >= 0 and record.offset + last < storage.numel()
            if not fits or num_elements > storage.numel():
                raise UserError("a tensor does not fit its storage. Fetch or write it again.")
        self._count(num_elements * storage.itemsize)
        return storage.as_strided(record.size, record.stride, record.offset if num_elements else 0).clone()

    def _stored(self, storage: _Storage) -> Tensor:
        """Reads a storage, once, as one flat tensor."""
        if storage not in self._storages:
            name = f"{self._root}data/{storage.key}"
            self._count(self._archive.getinfo(name).file_size)
            # Copied into a bytearray, because torch wants memory that it may write to.
            content = bytearray(_record(self._archive, name))
            flat = torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
            self._storages[storage] = flat
        return self._storages[storage]

    def _count(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise UserError("its tensors are several times larger than the file. Do not trust this file.")


def _records(module: Any, name: str, seen: set[int]) -> Iterator[tuple[str, _TensorRecord]]:  # noqa: ANN401
    """Goes through modules, each once; tensors in their lists and dicts are no parameters."""
    if not isinstance(module, _Module) or id(module) in seen:
        return
    seen.add(id(module))
    for key, child in module.attributes.items():
        _expect(isinstance(key, str) and len(name) + len(key) < _LONGEST_NAME)
        path = f"{name}.{key}" if name else key
        if isinstance(child, _TensorRecord):
            yield path, child
        else:
            yield from _records(child, path, seen)
