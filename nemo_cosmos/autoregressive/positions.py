"""Where tokens stand in their video: rotary tables, and positions that are added at the input of every layer.

What stands before the video's own tokens, and padding after them, has no place: its angles and its added positions are
zero, as published.

Letters: s = tokens of this rank, D = hidden size, H = channels per head.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from nemo_cosmos.autoregressive.config import Yarn
from nemo_cosmos.parallel.tokens import CausalShard
from nemo_cosmos.transformer.positions import Grid, sincos_rows
from nemo_cosmos.transformer.rotary import axis_channels


def _places(grid: Grid, shard: CausalShard, num_first: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each token in the video, int64 [s], and whether it is one of the video's, bool [s, 1]."""
    index = shard.positions(device) - num_first
    inside = (index >= 0) & (index < math.prod(grid))
    return index * inside, inside[:, None]


@lru_cache(maxsize=4)  # of videos and pictures, trained on and held out
@torch.inference_mode(False)  # else tables first made in generation could not be kept for a backward pass
def rope_tables(
    grid: Grid,
    head_dim: int,
    base: float,
    yarn: Yarn | None,
    shard: CausalShard,
    num_first: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine and sine of every token's angles; kept, as all steps of a run ask for the same few.

    Args:
        grid: Of the whole video.
        head_dim: H; a head of 128 has 44 channels for time and 42 each for rows and columns.
        base: Theta, the same on all axes.
        yarn: How the frequencies were extended.
        shard: This rank's tokens.
        num_first: Tokens before the video's own.
        device: Where the tables shall be.

    Returns:
        Two float32 [s, 1, 1, H / 2].

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864; Cosmos, https://arxiv.org/abs/2501.03575, 5.2.2.
    """
    index, inside = _places(grid, shard, num_first, device)
    _, height, width = grid
    places = (index // (height * width), index // width % height, index % width)
    lengths = (None, None, None) if yarn is None else (yarn.original_grid[0], *(yarn.original_grid[1],) * 2)
    angles = torch.cat(
        [
            place[:, None].float() * _frequencies(channels, base, yarn, length, device)
            for place, channels, length in zip(places, axis_channels(head_dim), lengths, strict=True)
        ],
        dim=-1,
    )
    angles = (angles * inside)[:, None, None]
    return angles.cos(), angles.sin()


def _frequencies(
    channels: int, base: float, yarn: Yarn | None, original_length: int | None, device: torch.device
) -> torch.Tensor:
    frequencies = 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
    if yarn is None or original_length is None:
        return frequencies
    fast, slow = (2 * math.pi * beta / original_length for beta in (yarn.beta_fast, yarn.beta_slow))
    stays = ((frequencies - slow) / (fast - slow)).clamp(0, 1)
    return frequencies * ((1 - stays) / yarn.scale + stays)


@lru_cache(maxsize=2)  # of videos and pictures; of the 13B's video one takes 132 MB in bf16
@torch.inference_mode(False)
def sincos_positions(
    grid: Grid, hidden_size: int, shard: CausalShard, num_first: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Positions that are added; see `nemo_cosmos.transformer.positions.sincos_rows`.

    Args:
        grid: Of the whole video.
        hidden_size: D.
        shard: This rank's tokens.
        num_first: Tokens before the video's own.
        dtype: Of the result.
        device: Of the result.

    Returns:
        [s, 1, D].
    """
    index, inside = _places(grid, shard, num_first, device)
    return (sincos_rows(index, grid, hidden_size) * inside).to(dtype)[:, None]
