"""Coding large pictures tile by tile: memory follows the tile, at the price of exactness.

The middle block attends over all pixels of a frame, and every convolution sees zeros beyond the picture's edge. A tile
coded alone has other neighbours and another edge, so tiles never add up to what the whole picture gives, neither at
the joints nor inside; overlaps are blended linearly to hide the joints. `seam_figure` measures what is left there.

Spans count cells: one cell is one latent pixel, or `spatial_compression` pixels of the video along each axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nemo_cosmos.errors import user_error

Place = tuple[int, int]
"""Row and column of a tile."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Size of the tiles, in pixels of the video and the same along height and width."""

    tile: int = 512
    """Edge of a tile; a multiple of the spatial compression. A picture no larger than this is one exact tile."""
    overlap: int = 64
    """What neighbours share at least; a multiple of the spatial compression, below `tile`. 0 leaves hard joints."""

    def __post_init__(self) -> None:
        """Checks both fields.

        Raises:
            UserError: The overlap is negative or leaves no progress from tile to tile.
        """
        if not 0 <= self.overlap < self.tile:
            raise user_error("overlap", self.overlap, f"at least 0 and below tile {self.tile}", "Lower it.")

    def spans(self, length: int, cell: int) -> list[slice]:
        """Cuts an axis into tiles of full size, the last one moved back to fit.

        Args:
            length: Cells along the axis.
            cell: Pixels of the video per cell.

        Returns:
            One slice of cells per tile.

        Raises:
            UserError: The cells do not divide tile or overlap.
        """
        for name in ("tile", "overlap"):
            if getattr(self, name) % cell:
                raise user_error(name, getattr(self, name), f"a multiple of {cell} pixels", "Round it.")
        tile, overlap = self.tile // cell, self.overlap // cell
        if length <= tile:
            return [slice(0, length)]
        starts = [*range(0, length - tile, tile - overlap), length - tile]
        return [slice(start, start + tile) for start in starts]


def code_tiles(
    x: Tensor, code: Callable[[Tensor, Place], Tensor], tiling: Tiling, *, cell: int, cell_in: int, cell_out: int
) -> Tensor:
    """Runs `code` on every tile and blends what comes out.

    Args:
        x: [..., H, W].
        code: Takes a tile and its place; returns the same axes with a tile of outputs.
        tiling: The tiles.
        cell: Pixels of the video per cell.
        cell_in: Entries of `x` per cell along each of the last two axes.
        cell_out: As many of the output.

    Returns:
        [..., H cell_out / cell_in, W cell_out / cell_in], in the dtype that `code` gives.

    Raises:
        UserError: The tiling does not fit the cells, or the outputs are whole numbers, which cannot be blended.
    """
    spans = [tiling.spans(length // cell_in, cell) for length in x.shape[-2:]]
    weights = [_blend_weights(of_axis, cell_out, x.device) for of_axis in spans]
    total: Tensor | None = None
    for row, span_h in enumerate(spans[0]):
        for column, span_w in enumerate(spans[1]):
            part = code(x[..., _scaled(span_h, cell_in), _scaled(span_w, cell_in)], (row, column))
            if not part.is_floating_point():
                raise user_error("tiling", part.dtype, "a code that can be blended", "Code the whole picture.")
            if total is None:
                size = [of_axis[-1].stop * cell_out for of_axis in spans]
                total = torch.zeros(*part.shape[:-2], *size, dtype=torch.float32, device=x.device)
            weight = weights[0][row][:, None] * weights[1][column]
            total[..., _scaled(span_h, cell_out), _scaled(span_w, cell_out)] += part * weight
    assert total is not None, "there is at least one tile"
    return total.to(part.dtype)


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def _blend_weights(spans: list[slice], cell_out: int, device: torch.device) -> list[Tensor]:
    """Returns for each tile of an axis its weight per entry, rising and falling linearly; together they are one."""
    overlaps = [0, *(before.stop - after.start for before, after in pairwise(spans)), 0]
    weights = [
        _ramp((span.stop - span.start) * cell_out, left * cell_out, right * cell_out).to(device)
        for span, (left, right) in zip(spans, pairwise(overlaps), strict=True)
    ]
    total = torch.zeros(spans[-1].stop * cell_out, device=device)
    for span, weight in zip(spans, weights, strict=True):
        total[_scaled(span, cell_out)] += weight
    return [weight / total[_scaled(span, cell_out)] for span, weight in zip(spans, weights, strict=True)]


def _ramp(length: int, rise: int, fall: int) -> Tensor:
    """Returns [length] of ones that rise linearly over the first `rise` entries and fall over the last `fall`."""
    steps = torch.arange(length) + 0.5
    return (steps / max(rise, 0.5)).clamp(max=1) * (steps.flip(0) / max(fall, 0.5)).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class SeamFigure:
    """How far a tiled result is from the untiled one along the joints; both 0 where there is one tile only."""

    max_abs: float
    """Largest absolute difference."""
    mean_abs: float
    """Mean absolute difference."""


def seam_figure(tiled: Tensor, untiled: Tensor, tiling: Tiling, *, cell: int, cell_in: int) -> SeamFigure:
    """Compares results where tiles meet: in their overlaps and one entry to either side.

    Args:
        tiled: [..., H, W], a latent or a video.
        untiled: The same without tiles.
        tiling: The tiles.
        cell: Pixels of the video per cell, the spatial compression.
        cell_in: Entries of `tiled` per cell along each axis: 1 for a latent, `cell` for a video.

    Raises:
        UserError: The shapes differ, or the tiling does not fit the cells.
    """
    if tiled.shape != untiled.shape:
        raise user_error("shape", tuple(tiled.shape), f"{tuple(untiled.shape)}", "Compare results of one video.")
    rows, columns = (_joints(length, tiling, cell, cell_in) for length in tiled.shape[-2:])
    on_joint = rows[:, None] | columns
    difference = (tiled.detach().float() - untiled.detach().float()).abs()[..., on_joint.to(tiled.device)]
    if difference.numel() == 0:
        return SeamFigure(max_abs=0.0, mean_abs=0.0)
    return SeamFigure(max_abs=difference.max().item(), mean_abs=difference.mean().item())


def _joints(length: int, tiling: Tiling, cell: int, cell_in: int) -> Tensor:
    """Returns bool [length], True where tiles meet along an axis."""
    joints = torch.zeros(length, dtype=torch.bool)
    for before, after in pairwise(tiling.spans(length // cell_in, cell)):
        joints[after.start * cell_in - 1 : before.stop * cell_in + 1] = True
    return joints
