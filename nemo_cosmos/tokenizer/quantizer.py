"""Finite scalar quantisation (FSQ): each dimension of the code is rounded to one of a few levels.

The codebook is the product of the levels and needs no storage: an index is the code's digits in a mixed base.

Shape letters: B batch, D dimensions of the code, ... the grid.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

_EPS = 1e-3
"""How far the bounds lie beyond the outermost levels, so that these are reached by finite values."""


class FSQuantizer(nn.Module):
    """Rounds codes to their levels, with the gradient of the unrounded bound (straight-through).

    Args:
        levels: Levels of each dimension, at least 2 each.

    Source: arXiv 2309.15505; `FSQuantizer` of NVIDIA cosmos-predict1 `tokenizer/modules/quantizers.py`.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Not persistent: they follow from the architecture. The names are the reference's.
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises.

        Args:
            z: Float [B, D, ...], unbounded.

        Returns:
            int32 indices [B, ...] from 0 to the product of the levels - 1, the first dimension being the fastest; and
            the codes [B, D, ...] in z's dtype, from -1 to 1, through which gradients flow.
        """
        bounded = self._bound(rearrange(z, "B D ... -> B ... D"))
        digits = bounded.detach().round()
        rounded = bounded + (digits - bounded).detach()
        half_width = self._levels // 2
        indices = ((digits.to(torch.int32) + half_width) * self._basis).sum(dim=-1, dtype=torch.int32)
        return indices, rearrange(rounded / half_width, "B ... D -> B D ...").type_as(z)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Looks codes up.

        Args:
            indices: Integers [B, ...] from 0 to the product of the levels - 1.

        Returns:
            Float32 [B, D, ...], what `forward` gave for these indices.
        """
        digits = (indices[..., None] // self._basis) % self._levels
        half_width = self._levels // 2
        return rearrange((digits - half_width) / half_width, "B ... D -> B D ...")

    def _bound(self, z: Tensor) -> Tensor:
        """Squeezes [..., D] between the outermost levels; at least in float32, as the levels' spacing needs it.

        An even number of levels has none at its middle, so it is shifted by half a level, and the argument such that 0
        still gives 0.
        """
        half_range = (self._levels - 1) * (1 + _EPS) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half_range).atanh()
        return (z + shift).tanh() * half_range - offset
