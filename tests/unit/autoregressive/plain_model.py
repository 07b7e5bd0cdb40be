"""The autoregressive transformer once more, in plain torch, from the published formulas alone.

It reads weights under the published names and knows nothing of the package; double precision where it is given that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, silu


@dataclass(frozen=True, kw_only=True)
class Sizes:
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float = 1e-5
    rope_theta: float = 500_000.0
    yarn: tuple[tuple[int, int, int], float, float, float] | None = None
    """Original grid, scale, beta_fast, beta_slow."""
    has_bov: bool = False
    adds_positions: bool = False
    tied: bool = False


def logits(weights: dict[str, torch.Tensor], sizes: Sizes, tokens_BS, grid, text_BLC=None) -> torch.Tensor:
    """[B, S, vocab_size]."""
    w = {name.removeprefix("model."): weight for name, weight in weights.items()}
    x = embedding(tokens_BS, w["tok_embeddings.weight"])
    angles = rope_angles(sizes, grid, tokens_BS.shape[1]).to(x)
    added = sincos(sizes, grid, tokens_BS.shape[1]).to(x) if sizes.adds_positions else None
    for n in range(sizes.layers):
        layer = {name.removeprefix(f"layers.{n}."): v for name, v in w.items() if name.startswith(f"layers.{n}.")}
        if added is not None:
            x = x + added
        h = norm(x, layer["attention_norm.weight"], sizes.eps)
        x = x + attention(layer, "attention", sizes, h, h, angles)
        if text_BLC is not None:
            h = norm(x, layer["cross_attention_norm.weight"], sizes.eps)
            x = x + attention(layer, "cross_attention", sizes, h, text_BLC, None)
        h = norm(x, layer["ffn_norm.weight"], sizes.eps)
        gated = silu(h @ layer["feed_forward.w1.weight"].T) * (h @ layer["feed_forward.w3.weight"].T)
        x = x + gated @ layer["feed_forward.w2.weight"].T
    output = w["tok_embeddings.weight"] if sizes.tied else w["output.weight"]
    return norm(x, w["norm.weight"], sizes.eps) @ output[: sizes.vocab_size].T


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(layer, block: str, sizes: Sizes, x, context, angles) -> torch.Tensor:
    def heads(name: str, source: torch.Tensor) -> torch.Tensor:
        rows = source @ layer[f"{block}.{name}.weight"].T
        return rows.unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2)  # B N S H

    q = norm(heads("wq", x), layer[f"{block}.q_norm.weight"], sizes.eps)
    k = norm(heads("wk", context), layer[f"{block}.k_norm.weight"], sizes.eps)
    v = heads("wv", context)
    if angles is not None:
        q, k = turn(q, angles), turn(k, angles)
    k, v = (t.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(sizes.head_dim)
    if angles is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ layer[f"{block}.wo.weight"].T


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    as_complex = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([as_complex.real, as_complex.imag], dim=-1)


def places(sizes: Sizes, grid, length: int):
    """(t, h, w) of every token, or None where it is none of the video's."""
    video = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    padded = [None] * sizes.has_bov + video
    return padded + [None] * (length - len(padded))


def axes(channels: int) -> tuple[int, int, int]:
    return channels - channels // 6 * 4, channels // 6 * 2, channels // 6 * 2


def rope_angles(sizes: Sizes, grid, length: int) -> torch.Tensor:
    """[S, H / 2]."""
    rows = []
    for place in places(sizes, grid, length):
        row: list[float] = []
        for axis, channels in enumerate(axes(sizes.head_dim)):
            for i in range(channels // 2):
                frequency = sizes.rope_theta ** (-2 * i / channels)
                if sizes.yarn is not None:
                    original, scale, fast, slow = sizes.yarn
                    turns = frequency * original[min(axis, 1)] / (2 * math.pi)
                    kept = min(max((turns - slow) / (fast - slow), 0), 1)
                    frequency *= kept + (1 - kept) / scale
                row.append(0.0 if place is None else place[axis] * frequency)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def sincos(sizes: Sizes, grid, length: int) -> torch.Tensor:
    """[S, D]."""
    rows = []
    for place in places(sizes, grid, length):
        row: list[float] = []
        for axis, channels in enumerate(axes(sizes.dim)):
            angles = [0.0 if place is None else place[axis] / 10000 ** (2 * i / channels) for i in range(channels // 2)]
            row += [math.sin(a) for a in angles] + [math.cos(a) * (place is not None) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
