"""How well a discrete tokenizer uses its codebook, and what its code costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nemo_cosmos.contracts import Record
from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class CodebookUse(Record):
    """Use of a codebook over some tokens; few tokens cannot use a large codebook."""

    codebook_size: int
    num_tokens: int
    share_used: float
    """Codes that occur at least once, of all codes."""
    perplexity: float
    """exp of the entropy in nats: how many equally frequent codes would be as varied; 1 to codebook_size."""


def count_codes(indices: torch.Tensor, codebook_size: int) -> np.ndarray:
    """Counts how often each code occurs; the counts of several videos add up.

    Args:
        indices: Whole numbers (int32) in [0, codebook_size), any shape.
        codebook_size: Number of codes.

    Returns:
        int64 [codebook_size].

    Raises:
        UserError: An index is out of range, or they are no whole numbers.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise user_error("indices", indices.dtype, "whole numbers such as int32", "Give what the quantizer returns.")
    flat = indices.detach().flatten().long().cpu()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < codebook_size:
        got = f"{int(flat.min())} to {int(flat.max())}"
        raise user_error("indices", got, f"0 to {codebook_size - 1}", "Give the tokenizer's own codebook size.")
    return torch.bincount(flat, minlength=codebook_size).numpy()


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Sums up counts [codebook_size] as `count_codes` gives them.

    Raises:
        UserError: There is no token.
    """
    num_tokens = int(counts.sum())
    if num_tokens == 0:
        raise user_error("number of tokens", 0, "at least 1", "Encode something first.")
    shares = counts[counts > 0] / num_tokens
    return CodebookUse(
        codebook_size=len(counts),
        num_tokens=num_tokens,
        share_used=float((counts > 0).mean()),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
    )


def code_bits(code: torch.Tensor, codebook_size: int | None) -> float:
    """Bits that a code takes when stored plainly, without entropy coding.

    Args:
        code: Indices, or a continuous latent in the dtype that it is stored in.
        codebook_size: Of a discrete tokenizer: log2 of it for each token. None for a latent: its numbers in its dtype.

    Returns:
        Bits.
    """
    return code.numel() * (8.0 * code.element_size() if codebook_size is None else float(np.log2(codebook_size)))
