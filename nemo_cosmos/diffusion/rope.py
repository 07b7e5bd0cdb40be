"""Rotary positions over time, height and width.

Letters: s = tokens of this rank, B = batch, H = channels per head.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from nemo_cosmos.transformer.rotary import axis_channels

_THETA = 10000.0


@lru_cache(maxsize=4)  # of videos and pictures, trained on and held out; of the 7B's longest video one takes 29 MB
@torch.inference_mode(False)  # else tables first made in generation could not be kept for a backward pass
def rope_tables(
    grid: tuple[int, int, int],
    head_dim: int,
    ratio: tuple[float, float, float],
    frame_steps: tuple[float, ...],
    tokens: tuple[int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine and sine of every token's angles; kept, as all steps of a run ask for the same few.

    Args:
        grid: Tokens along T, H, W.
        head_dim: H.
        ratio: NTK ratio along T, H, W: theta of an axis with d channels becomes 10000 * ratio^(d / (d - 2)).
        frame_steps: How far the temporal index moves per frame (base_fps / fps), for all samples or for each.
        tokens: First and one-past-last token of this rank.
        device: Where the tables shall be.

    Returns:
        Two float32 [s, 1 or B, 1, H / 2].

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864; Cosmos, https://arxiv.org/abs/2501.03575, 5.1.2.
    """
    frequencies = [_frequencies(d, r, device) for d, r in zip(axis_channels(head_dim), ratio, strict=True)]
    steps = torch.tensor(frame_steps, dtype=torch.float32, device=device)
    num_frames, height, width = grid
    index = torch.arange(*tokens, device=device)
    time = (index // (height * width)).float()[:, None] * steps
    row, column = (index // width % height).float(), (index % width).float()
    angles = torch.cat(
        [
            time[..., None] * frequencies[0],
            (row[:, None] * frequencies[1])[:, None].expand(-1, len(frame_steps), -1),
            (column[:, None] * frequencies[2])[:, None].expand(-1, len(frame_steps), -1),
        ],
        dim=-1,
    )
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def _frequencies(channels: int, ratio: float, device: torch.device) -> torch.Tensor:
    theta = _THETA * ratio ** (channels / (channels - 2))
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
