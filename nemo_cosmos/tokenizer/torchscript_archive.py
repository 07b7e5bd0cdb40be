"""Weights out of a TorchScript archive without running anything that stands in it.

An archive is a zip: `data.pkl` pickles the tree of modules, `data/<key>` hold the tensors' bytes, and `code/` holds
programs. `torch.jit.load` compiles the programs; a plain unpickler would call whatever `data.pkl` names. Here `code/`
is never opened, and `data.pkl` may name nothing but what rebuilds tensors, plain containers, and modules, of which only
the attributes are taken.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError

_SCRIPT_CLASSES = "__torch__."
"""Prefix of the names of an archive's own classes."""

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


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a TorchScript archive by their dotted names, as stored, on the CPU.

    Args:
        path: What `torch.jit.save` wrote, such as `encoder.jit`.

    Returns:
        Parameters and buffers of the module and of all modules inside it. Constants of its programs are left out.

    Raises:
        UserError: The file is missing or broken, or its pickle names anything that is not needed for tensors; nothing
            of it has been run then.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            module = _Unpickler(archive, root).load()
            return dict(_tensors(module, ""))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # an unpickler raises whatever it stumbles over
        raise UserError(f"{path}: not a whole TorchScript archive ({error!r}). Fetch or write it again.") from error


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the zip that holds everything."""
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError("holds no data.pkl, so it is no TorchScript archive. Fetch or write it again.")
    return roots[0]


class _ScriptModule:
    """Base of what takes the attributes of a class of the archive; it has no behaviour.

    Every pickled name has a class of its own, for a pickle may set attributes of what it is given.
    """


class _Unpickler(pickle.Unpickler):
    """An unpickler in which every name is looked up here, never imported.

    Args:
        archive: The open zip.
        root: Folder inside it.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_record(archive, f"{root}data.pkl")), encoding="utf-8")
        if f"{root}byteorder" in archive.namelist() and _record(archive, f"{root}byteorder") != b"little":
            raise UserError("its tensors are not little-endian. Write it again on another machine.")
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - a class, a dtype or a function
        """Gives what a pickled name stands for; everything else is refused."""
        if module.startswith(_SCRIPT_CLASSES):
            return type(name, (_ScriptModule,), {})
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _function(_rebuild)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name in _TYPED_LISTS:
            return _function(_first)
        raise UserError(
            f"data.pkl names {module}.{name}, which no tensor needs; nothing was run. Do not trust this file."
        )

    def persistent_load(self, pid: Any) -> Tensor:  # noqa: ANN401 - whatever the pickle holds
        """Reads a storage, once, as one flat tensor."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UserError(f"data.pkl refers to {pid!r}, not to a storage. Fetch or write it again.")
        if key not in self._storages:
            # Copied into a bytearray, because torch wants memory that it may write to.
            content = bytearray(_record(self._archive, f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        # torch stores these uncompressed; a compressed one might unfold to more than the memory holds.
        raise UserError(f"{name} is compressed, as torch never writes it. Do not trust this file.")
    return archive.read(info)


def _function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh function for each pickled name, for the same reason."""
    return lambda *args: function(*args)


def _first(value: Any, *_: Any) -> Any:  # noqa: ANN401 - any value of the archive
    return value


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:  # noqa: ANN401
    """A tensor of its own out of a storage; torch checks the bounds."""
    if math.prod(size) > storage.numel():
        raise UserError(f"a tensor of shape {size} does not fit its storage. Fetch or write it again.")
    return storage.as_strided(size, stride, offset).clone()


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401 - any value of the archive
    """Goes through modules; tensors in their lists and dicts are no parameters."""
    children: Mapping[str, Any] = vars(value) if isinstance(value, _ScriptModule) else {}
    for key, child in children.items():
        path = f"{name}.{key}" if name else key
        if isinstance(child, Tensor):
            yield path, child
        else:
            yield from _tensors(child, path)
