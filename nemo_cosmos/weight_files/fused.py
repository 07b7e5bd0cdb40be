"""Several weights that stand in one, interleaved group by group, and the names that a state dict must have.

Megatron's linear layers for queries, keys and values are such: group by group, so that a slice of rows is a slice of
heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights


def weights_only(weights: Weights) -> Weights:
    """Leaves out TransformerEngine's extra states."""
    return {name: weight for name, weight in weights.items() if not name.endswith("_extra_state")}


def check_names(weights: Weights, expected: set[str], what: str) -> None:
    """Refuses weights other than those of an architecture.

    Args:
        weights: By name.
        expected: Names.
        what: Whose weights they are, for the message.

    Raises:
        UserError: A weight is missing or unknown.
    """
    missing, unknown = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unknown:
        raise UserError(
            f"{what}: {len(missing)} weights missing {missing[:4]}, {len(unknown)} unknown {unknown[:4]}, "
            f"expected the {len(expected)} of this configuration. Choose the preset that the checkpoint belongs to, or "
            "fetch the file again if it is damaged."
        )


def fused_part(fused: StoredTensor, num_groups: int, sizes: Sequence[int], index: int) -> StoredTensor:
    """One of the weights that stand in a fused one.

    Args:
        fused: Rows, group by group.
        num_groups: Groups of rows.
        sizes: Rows that each weight has in a group, up to a common factor.
        index: Of the weight.
    """
    rows, columns = fused.shape
    unit = rows // (num_groups * sum(sizes))

    def read() -> torch.Tensor:
        groups = fused.read().view(num_groups, -1, columns)
        part = groups.split([unit * size for size in sizes], dim=1)[index]
        return part.reshape(-1, columns).contiguous()

    return StoredTensor(shape=torch.Size((num_groups * unit * sizes[index], columns)), dtype=fused.dtype, read=read)


def fuse(parts: Sequence[StoredTensor], num_groups: int, sizes: Sequence[int], name: str) -> StoredTensor:
    """The fused weight of several; the inverse of `fused_part`.

    Args:
        parts: The weights.
        num_groups: Groups of rows.
        sizes: Rows that each weight has in a group, up to a common factor.
        name: Of the fused weight, for errors.

    Raises:
        UserError: The weights are not matrices of one width and type whose rows are in that proportion.
    """
    first = parts[0]
    if not _fit(parts, num_groups, sizes):
        got = [(list(part.shape), str(part.dtype)) for part in parts]
        raise user_error(
            f"parts of {name}",
            got,
            f"matrices of one width and type, with rows as {list(sizes)} in each of {num_groups} groups",
            "Convert a checkpoint of one model.",
        )

    def read() -> torch.Tensor:
        groups = [part.read().view(num_groups, -1, part.shape[1]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    rows = sum(part.shape[0] for part in parts)
    return StoredTensor(shape=torch.Size((rows, first.shape[1])), dtype=first.dtype, read=read)


def _fit(parts: Sequence[StoredTensor], num_groups: int, sizes: Sequence[int]) -> bool:
    first = parts[0]
    if any(len(part.shape) != 2 or part.dtype != first.dtype for part in parts):
        return False
    unit, rest = divmod(first.shape[0], num_groups * sizes[0])
    expected = [(num_groups * unit * size, first.shape[1]) for size in sizes]
    return rest == 0 and [tuple(part.shape) for part in parts] == expected
