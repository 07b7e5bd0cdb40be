"""Rotary positions over time, height and width.

Letters: S = tokens of the whole sequence, s = tokens of this rank, B = batch, N = heads, H = channels per head.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_THETA = 10000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with T, H and W; a head of 128 has 44, 42, 42."""
    spatial = head_dim // 6 * 2
    return head_dim - 2 * spatial, spatial, spatial


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


def apply_rope(x_sBNH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns channel pairs (i, i + H / 2) by the tables' angles, in float32; dtype and shape stay."""
    return _Rotate.apply(x_sBNH, *tables)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: so nothing of the input is kept for it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    half = first.shape[-1]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned.to(x.dtype)
