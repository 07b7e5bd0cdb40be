"""Weights that are read one at a time, so that a conversion never holds a whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of which shape and type are known, and the values read when its turn comes."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """Gives the values, on the CPU; each call reads them anew."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Wraps a tensor that is in memory."""
        return cls(shape=tensor.shape, dtype=tensor.dtype, read=lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> StoredTensor:
        """The same, cast when read; numbers that are not floating-point stay what they are."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return StoredTensor(shape=self.shape, dtype=dtype, read=lambda: self.read().to(dtype))


Weights = Mapping[str, StoredTensor]
"""A state dict by name."""


def stored(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Wraps a state dict that is in memory."""
    # Megatron's modules have an empty `_extra_state`, which is no tensor.
    return {name: StoredTensor.of(tensor) for name, tensor in tensors.items() if tensor is not None}


def read_all(weights: Weights) -> dict[str, torch.Tensor]:
    """Reads a whole state dict."""
    return {name: weight.read() for name, weight in weights.items()}
