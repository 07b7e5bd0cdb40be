"""Clips of different sizes as one sequence of tokens, in which each attends to itself alone.

Source: sequence packing as in NaViT (Dehghani et al. 2023, arXiv 2307.06304), with Megatron's `PackedSeqParams`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import get_backend
from nemo_cosmos.parallel.device import on_device
from nemo_cosmos.parallel.tokens import TokenShard

Grid = tuple[int, int, int]
"""Tokens along T, H, W."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Where each clip stands in the sequence; a batch of clips of one size is a pack of one."""

    grids: tuple[Grid, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each clip."""
        return tuple(math.prod(grid) for grid in self.grids)

    def pieces(self, shard: TokenShard) -> list[tuple[int, TokenShard]]:
        """What a rank holds of the sequence.

        Args:
            shard: The rank's tokens of the whole sequence.

        Returns:
            Number of each clip that it touches, and the piece that it has of that clip's own tokens.
        """
        found = []
        ends = itertools.accumulate(self.lengths)
        for index, (length, end) in enumerate(zip(self.lengths, ends, strict=True)):
            first = end - length
            start, stop = max(shard.start, first), min(shard.stop, end)
            if start < stop:
                found.append((index, TokenShard(start - first, stop - first, length)))
        return found

    def attention_limits(
        self, attended: TokenShard, text_length: int, device: torch.device
    ) -> tuple[PackedSeqParams, PackedSeqParams]:
        """Bounds of the clips: of the whole sequence for self-attention, of a rank's piece for cross-attention.

        Args:
            attended: That piece, of a context-parallel rank.
            text_length: Text tokens of each clip.
            device: Of the tokens.
        """
        present = {index: len(piece) for index, piece in self.pieces(attended)}
        own = tuple(present.get(index, 0) for index in range(len(self.lengths)))
        text = (text_length,) * len(self.lengths)
        return _limits(self.lengths, self.lengths, device), _limits(own, text, device)


def _limits(queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=_bounds(queries, device),
        cu_seqlens_kv=_bounds(keys, device),
        max_seqlen_q=max(queries),
        max_seqlen_kv=max(keys),
    )


def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return on_device([0, *itertools.accumulate(lengths)], device, torch.int32)


def check_packed_layout(config: DiTConfig) -> None:
    """Refuses context parallelism that packs cannot have.

    Its ranks' pieces begin and end within clips. By all-to-all each attends for some of the heads to all tokens, to
    which the clips' bounds apply as they are; a ring would need those of every pair of pieces, and TransformerEngine
    takes each clip to be cut over all ranks by itself.

    Args:
        config: The model with its layout.

    Raises:
        UserError: There are several ranks, and they cannot share heads.
    """
    size, heads = config.context_parallel_size, config.num_attention_heads // config.tensor_model_parallel_size
    if size == 1:
        return
    if get_backend(config.backend).name == "te":
        raise user_error(
            "context-parallel size",
            size,
            "1 with packed clips and TransformerEngine, which would cut every clip over the ranks",
            "Use tensor parallelism, backend 'torch', or batches of one size.",
        )
    if config.cp_comm_type not in (None, "a2a") or heads % size:
        raise user_error(
            "context-parallel size",
            size,
            f"with packed clips a divisor of a rank's {heads} heads, and cp_comm_type 'a2a': a ring knows no clips",
            "Use tensor parallelism, or batches of one size.",
        )


def check_pack(latents: list[torch.Tensor], others: dict[str, int | None]) -> None:
    """Refuses a pack that cannot be computed.

    Args:
        latents: One clip each, 1 C T H W.
        others: How many of each other input there are; None for one that is absent.

    Raises:
        UserError: With the reason.
    """
    batches = [len(latent) for latent in latents]
    if not batches or set(batches) != {1}:
        raise user_error("batch sizes in a pack", batches, "1 for each of its clips", "Give clips one by one.")
    wrong = {name: count for name, count in others.items() if count not in (None, len(latents))}
    if wrong:
        raise user_error("entries for a pack", wrong, f"one for each of its {len(latents)} clips", "Give as many.")
