"""Published weights that were cut over tensor-parallel ranks, one file for each (`..._mp_0.pt`, `..._mp_1.pt`, ...)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_cosmos.autoregressive.state_dict import plain_names
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights

_SHARD = re.compile(r"_mp_(\d+)(?=\.(pt|safetensors)$)")
_AXIS = {
    0: ("tok_embeddings.weight", "output.weight", "wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight"),
    1: ("wo.weight", "w2.weight"),
}


def shard_files(path: Path) -> list[Path]:
    """Finds the files of all ranks.

    Args:
        path: One of them, or a file of whole weights.

    Returns:
        All of them in the order of the ranks, or the one file.

    Raises:
        UserError: One is missing.
    """
    if not _SHARD.search(path.name):
        return [path]
    stem = _SHARD.sub("_mp_*", path.name)
    found = {int(_SHARD.search(file.name)[1]): file for file in path.parent.glob(stem) if _SHARD.search(file.name)}  # type: ignore[index]
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing or not found:
        raise UserError(f"{path.parent / stem}: no file of ranks {missing or [0]}. Give the files of all ranks.")
    return [found[rank] for rank in sorted(found)]


def merge_shards(shards: Sequence[Weights]) -> Weights:
    """Joins the ranks' weights, each when it is read.

    Of a norm, which every rank has whole, the mean is taken, as in the published merging: their training lets ranks
    drift apart by rounding.

    Args:
        shards: Of each rank, in order, under the reference's names.

    Returns:
        Whole weights under the reference's names, without the prefix `model.`.

    Raises:
        UserError: The ranks do not have the same weights.
    """
    plain = [plain_names(shard) for shard in shards]
    if len(plain) == 1:
        return plain[0]
    for rank, shard in enumerate(plain):
        if shard.keys() != plain[0].keys():
            other = sorted(shard.keys() ^ plain[0].keys())[:4]
            raise UserError(
                f"weights of rank {rank}: {other} are not on this rank and on rank 0 both, expected the same names. "
                "Give files of one model."
            )
    return {name: _merged(name, [shard[name] for shard in plain]) for name in plain[0]}


def _merged(name: str, parts: list[StoredTensor]) -> StoredTensor:
    first = parts[0]
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        got = [(list(part.shape), str(part.dtype)) for part in parts]
        raise user_error(f"{name} of all ranks", got, "one shape and type", "Give files of one model.")
    axis = next((axis for axis, endings in _AXIS.items() if name.endswith(endings)), None)
    if axis is None:
        return StoredTensor(shape=first.shape, dtype=first.dtype, read=lambda: _mean([part.read() for part in parts]))
    shape = list(first.shape)
    shape[axis] *= len(parts)
    return StoredTensor(
        shape=torch.Size(shape),
        dtype=first.dtype,
        read=lambda: torch.cat([part.read() for part in parts], dim=axis),
    )


def _mean(copies: list[torch.Tensor]) -> torch.Tensor:
    if all(torch.equal(copy, copies[0]) for copy in copies):
        return copies[0]  # to the bit
    return torch.stack(copies).float().mean(dim=0).to(copies[0].dtype)
