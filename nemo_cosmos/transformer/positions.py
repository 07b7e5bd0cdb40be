"""Fixed positions that are added at the input of every block, besides the rotary ones.

Letters: s = tokens of this rank, D = hidden size.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from nemo_cosmos.transformer.rotary import axis_channels

Grid = tuple[int, int, int]
"""Tokens along T, H, W."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # as the rotary tables: what generation makes must serve training
def sincos_positions(
    grid: Grid, hidden_size: int, tokens: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Sines, then cosines, of a token's frame, row and column, side by side; kept, as all steps ask for the same few.

    Args:
        grid: Of the whole sequence.
        hidden_size: D; its channels are shared out to the axes as a head's are to the rotary ones.
        tokens: First and one-past-last token of this rank.
        dtype: Of the result.
        device: Of the result.

    Returns:
        [s, 1, D].

    Source: Vaswani et al., https://arxiv.org/abs/1706.03762, 3.5; the published multi-view model's extra positions.
    """
    _, height, width = grid
    index = torch.arange(*tokens, device=device)
    places = (index // (height * width), index // width % height, index % width)
    columns = []
    for place, channels in zip(places, axis_channels(hidden_size), strict=True):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        angles = place[:, None] * 10000.0**-exponents
        columns += [angles.sin(), angles.cos()]
    return torch.cat(columns, dim=-1).to(dtype)[:, None]
