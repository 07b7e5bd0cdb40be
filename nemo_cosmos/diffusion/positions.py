"""Positions that are added at the input of every block, besides the rotary ones.

Letters: S = tokens of the whole sequence, s = tokens of this rank, D = hidden size, R = table rows that a rank's tokens
read.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import nn

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.parallel.tokens import TokenShard
from nemo_cosmos.transformer.positions import Grid, sincos_rows


class LearnablePositions(nn.Module):
    """One table per axis; their sum, scaled to unit root mean square, is a token's position.

    Source: Cosmos, https://arxiv.org/abs/2501.03575, 5.1.2 (absolute positional embedding).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        sizes = config.token_grid(config.max_latent_size)
        self.pos_emb_t, self.pos_emb_h, self.pos_emb_w = (
            nn.Parameter(torch.empty(size, config.hidden_size, dtype=config.params_dtype)) for size in sizes
        )

    def forward(self, grid: Grid, frames: slice) -> torch.Tensor:
        """Rows of the tables that `frames` of the grid read, [R, D]: over time, then height, then width."""
        _, height, width = grid
        return torch.cat([self.pos_emb_t[frames], self.pos_emb_h[:height], self.pos_emb_w[:width]])


def learned_positions(rows_RD: torch.Tensor, grid: Grid, shard: TokenShard, frames: slice) -> torch.Tensor:
    """Adds up the rows of `LearnablePositions`.

    Args:
        rows_RD: What that module gave for the same grid and frames.
        grid: Of the whole sequence.
        shard: This rank's tokens.
        frames: Frames that they belong to.

    Returns:
        [s, 1, D].
    """
    _, height, width = grid
    over_t, over_h, over_w = rows_RD.split([frames.stop - frames.start, height, width])
    table = over_t[:, None, None].float() + over_h[None, :, None] + over_w[None, None]
    first = frames.start * height * width
    emb_sD = rearrange(table, "T H W D -> (T H W) D")[shard.start - first : shard.stop - first]
    norm = torch.linalg.vector_norm(emb_sD, dim=-1, keepdim=True)
    return (emb_sD / (1e-6 + norm / math.sqrt(emb_sD.shape[-1]))).to(rows_RD.dtype)[:, None]


@lru_cache(maxsize=2)  # of videos and pictures; of the 7B's longest video one takes 460 MB in bf16
@torch.inference_mode(False)  # as the rotary tables: what generation makes must serve training
def sincos_positions(
    grid: Grid, hidden_size: int, tokens: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """See `nemo_cosmos.transformer.positions.sincos_rows`; kept, as all steps ask for the same few.

    Args:
        grid: Of the whole sequence.
        hidden_size: D.
        tokens: First and one-past-last token of this rank.
        dtype: Of the result.
        device: Of the result.

    Returns:
        [s, 1, D].
    """
    return sincos_rows(torch.arange(*tokens, device=device), grid, hidden_size).to(dtype)[:, None]
