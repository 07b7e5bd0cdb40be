"""Fixed positions that are added at the input of every block, besides the rotary ones.

Letters: s = tokens of this rank, D = hidden size.
"""

from __future__ import annotations

import torch

from nemo_cosmos.transformer.rotary import axis_channels

Grid = tuple[int, int, int]
"""Tokens along T, H, W."""


def sincos_rows(index_s: torch.Tensor, grid: Grid, hidden_size: int) -> torch.Tensor:
    """Sines, then cosines, of a token's frame, row and column, side by side.

    Args:
        index_s: Numbers of the tokens, counted frame by frame and row by row.
        grid: Of the whole video.
        hidden_size: D; its channels are shared out to the axes as a head's are to the rotary ones.

    Returns:
        float64 [s, D].

    Source: Vaswani et al., https://arxiv.org/abs/1706.03762, 3.5; the published models with such extra positions.
    """
    _, height, width = grid
    columns = []
    places = (index_s // (height * width), index_s // width % height, index_s % width)
    for place, channels in zip(places, axis_channels(hidden_size), strict=True):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=index_s.device) / channels
        angles = place[:, None] * 10000.0**-exponents
        columns += [angles.sin(), angles.cos()]
    return torch.cat(columns, dim=-1)
