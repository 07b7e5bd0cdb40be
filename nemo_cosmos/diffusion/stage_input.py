"""What crosses from one pipeline stage to the next: hidden states and, behind them, what conditions every block.

So time, actions and position tables are embedded once, on the first stage, which alone holds their weights; gradients
come back the way the vectors went. Behind the s tokens of the hidden states stand 4 F rows of the conditioning and the
R rows of the position tables, a few hundred against ten thousand tokens.

Letters: s = tokens of this rank, B = batch, D = hidden size, F = groups of tokens that share their modulation,
R = rows of the position tables, 0 without learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Vectors that every block of every stage reads."""

    emb_FBD: torch.Tensor
    """Time embedding after SiLU."""
    shared_FBC: torch.Tensor
    """Vector of width 3 D that all adaptive norms share."""
    position_rows_RD: torch.Tensor | None
    """See `positions.LearnablePositions`."""


def pack(hidden_sBD: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """Puts both into one tensor [s + 4 F + R, B, D], the one that Megatron's schedules send."""
    shared_GBD = rearrange(conditioning.shared_FBC, "F B (three D) -> (three F) B D", three=3)
    parts = [hidden_sBD, conditioning.emb_FBD, shared_GBD]
    if conditioning.position_rows_RD is not None:
        parts.append(conditioning.position_rows_RD[:, None].expand(-1, hidden_sBD.shape[1], -1))
    return torch.cat(parts)


def unpack(packed: torch.Tensor, num_tokens: int, num_groups: int) -> tuple[torch.Tensor, Conditioning]:
    """Inverse of `pack`.

    Args:
        packed: From the stage before.
        num_tokens: s.
        num_groups: F.
    """
    num_rows = len(packed) - num_tokens - 4 * num_groups
    hidden_sBD, emb_FBD, shared_GBD, rows_RBD = packed.split([num_tokens, num_groups, 3 * num_groups, num_rows])
    return hidden_sBD, Conditioning(
        emb_FBD=emb_FBD,
        shared_FBC=rearrange(shared_GBD, "(three F) B D -> F B (three D)", three=3),
        position_rows_RD=rows_RBD[:, 0] if num_rows else None,
    )
