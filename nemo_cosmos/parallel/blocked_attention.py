"""Attention in bfloat16 on CPUs, from large matrix products.

torch's own kernel for CPUs (`scaled_dot_product_attention`) works on small tiles in bfloat16 and reaches less than half
of what the processor does in a large product of that type. Here one head's scores are made for a block of queries
against all keys at once, so that nearly all time goes into such products. For the way back the probabilities are kept,
as Megatron's unfused attention keeps them (its selective recomputation does not), unless those of a call are
very many: then it holds no more than a block of them, and makes them a second time.

Scores are bfloat16 too. oneDNN's product takes a bias and adds it before it rounds: minus the score that has most
weight for a query, so that what is rounded there is small. As the norms of queries and keys bound the scores, no
maximum need be looked for. All this adds less to the output's error than the rounding of queries and keys to bfloat16
has made already.

Letters: s = query tokens, l = key tokens, B = batch, N = heads, H = channels per head, i = a block of queries.

Source: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 1 and B.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from nemo_cosmos.parallel.linear import ONEDNN_LINEAR
from nemo_cosmos.parallel.tokens import AutogradContext

_MIN_SCORES = 2**19
"""Scores of a head from which on the products are large enough to be faster than torch's kernel."""
_BLOCK_SCORES = 2**21
"""Scores of a block: with their gradients they stay in the last cache, and need no new pages of memory."""
_MOST_KEPT_SCORES = 2**27
"""Most scores, of all heads and clips of one call, that are kept for the way back: 256 MiB for each of a model's calls.
`recompute_modules=["core_attn"]` keeps none."""
_SUMMED = 64
"""So many powers are added up before the sum is rounded to bfloat16."""
_LARGEST_POWER = 80.0
"""Sums of so large powers of two, and small gradients over them, are still numbers in float32 and bfloat16."""


def suits_blocks(query_sBNH: torch.Tensor, key_lBNH: torch.Tensor, *, scale: float | None = None) -> bool:
    """Whether `blocked_attention` takes these and is the faster way; arguments as there."""
    num_scores = query_sBNH.shape[0] * key_lBNH.shape[0]
    on_cpu_in_bf16 = query_sBNH.device.type == "cpu" and query_sBNH.dtype == torch.bfloat16
    same_heads = query_sBNH.shape[2] == key_lBNH.shape[2]
    if ONEDNN_LINEAR is None or not on_cpu_in_bf16 or not same_heads or num_scores < _MIN_SCORES:
        return False
    scale = query_sBNH.shape[-1] ** -0.5 if scale is None else scale
    largest_score = scale * _norms(query_sBNH).amax().item() * _norms(key_lBNH).amax().item()
    return largest_score * math.log2(math.e) <= _LARGEST_POWER


def blocked_attention(
    query_sBNH: torch.Tensor, key_lBNH: torch.Tensor, value_lBNH: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attends every query to every key, without mask or dropout.

    Args:
        query_sBNH: Queries, bfloat16.
        key_lBNH: Keys.
        value_lBNH: Values.
        scale: Factor on the scores; 1 / sqrt(H) where None.

    Returns:
        [s, B, N, H].
    """
    scale = query_sBNH.shape[-1] ** -0.5 if scale is None else scale
    return _BlockedAttention.apply(query_sBNH, key_lBNH, value_lBNH, scale)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        shift = _likely_score(query, key, scale)
        total = torch.empty_like(shift)
        keeps = any(ctx.needs_input_grad) and total.numel() * len(key) <= _MOST_KEPT_SCORES
        kept: list[torch.Tensor] = []
        for b, n in _heads(query):
            powers = _Powers(query[:, b, n], key[:, b, n], shift[:, b, n], scale)
            for block in _attend(powers, value[:, b, n].t().contiguous(), out[:, b, n], total[:, b, n]):
                kept += [block] if keeps else []
        ctx.save_for_backward(query, key, value, out, shift, total, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: AutogradContext, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, shift, total, *kept = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        blocks = iter(kept)
        for b, n in _heads(query):
            powers = _Powers(query[:, b, n], key[:, b, n], shift[:, b, n], ctx.scale)
            grad_sH = (grad_out[:, b, n].float() / total[:, b, n, None]).bfloat16()
            mean_s = (grad_sH.float() * out[:, b, n].float()).sum(dim=1)
            own = [grad[:, b, n] for grad in grads]
            _attend_backward(powers, blocks, value[:, b, n].contiguous(), grad_sH, mean_s, own)
        return *grads, None


def _heads(query: torch.Tensor) -> Iterator[tuple[int, int]]:
    return ((b, n) for b in range(query.shape[1]) for n in range(query.shape[2]))


def _norms(x_sBNH: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x_sBNH.detach(), dim=-1, dtype=torch.float32)


def _likely_score(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """About the mean score under each query's attention, in units of log 2; float32 [s, B, N].

    Were scores normal around 0 with deviation d, that would be d^2 log 2, but not more than the largest of l of them. A
    bad guess costs exactness only.
    """
    query_norms, key_norms = _norms(query) * (scale * math.log2(math.e)), _norms(key)
    spread = query_norms * key_norms.square().mean(dim=0).div(key.shape[-1]).sqrt()
    likely = spread * (spread * math.log(2)).clamp(max=math.sqrt(2 * math.log(len(key))))
    return likely.clamp(max=_LARGEST_POWER - query_norms.amax() * key_norms.amax())


class _Powers:
    """2^(score - shift) of one head, with scores in units of log 2: the probabilities but for the sum."""

    def __init__(self, query_sH: torch.Tensor, key_lH: torch.Tensor, shift_s: torch.Tensor, scale: float) -> None:
        self.query_sH, self.key_lH = query_sH.contiguous(), key_lH.contiguous()
        self.scale = scale
        self._to_log2_sH = self.query_sH * (scale * math.log2(math.e))
        self._minus_shift_s = -shift_s

    def of(self, queries: slice) -> torch.Tensor:
        """[l, i]: queries run along the row, for a bias is a row."""
        return _product(self.key_lH, self._to_log2_sH[queries], self._minus_shift_s[queries]).exp2_()


def _product(left_lH: torch.Tensor, right_iH: torch.Tensor, bias_i: torch.Tensor) -> torch.Tensor:
    return ONEDNN_LINEAR(left_lH, right_iH, bias_i, "none", [], "")


def _blocks(num_queries: int, num_keys: int) -> list[slice]:
    size = max(_BLOCK_SCORES // num_keys, 64)
    return [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def _attend(
    powers: _Powers, value_Hl: torch.Tensor, out_sH: torch.Tensor, total_s: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Gives each block of powers; once all are taken `out_sH`, and `total_s`, the sums of the powers, are filled."""
    summed_Hs = out_sH.new_empty(out_sH.shape[::-1])  # products are faster with both factors as they lie
    for queries in _blocks(len(out_sH), value_Hl.shape[1]):
        powers_li = powers.of(queries)
        total_s[queries] = _sums(powers_li)
        summed_Hs[:, queries] = torch.mm(value_Hl, powers_li)
        yield powers_li
    out_sH.copy_(summed_Hs.t() / total_s[:, None])


def _sums(powers_li: torch.Tensor) -> torch.Tensor:
    """Sums over the keys, float32 [i]. To sum bfloat16 in float32 torch would first write all of it in float32.

    It adds up in float32 and rounds what comes out. With many keys there are many such sums, whose roundings even out;
    with few the result is as exact as one number of bfloat16.
    """
    whole = len(powers_li) // _SUMMED * _SUMMED
    parts = [powers_li[:whole].unflatten(0, (-1, _SUMMED)).sum(dim=1), powers_li[whole:].sum(dim=0, keepdim=True)]
    return torch.cat(parts).sum(dim=0, dtype=torch.float32)


def _attend_backward(
    powers: _Powers,
    kept: Iterator[torch.Tensor],
    value_lH: torch.Tensor,
    grad_sH: torch.Tensor,
    mean_s: torch.Tensor,
    grads: list[torch.Tensor],
) -> None:
    """Fills the gradients of query, key and value.

    `kept` gives this head's blocks of powers first, or nothing; `grad_sH` is the output's gradient over the sums,
    `mean_s` its mean.
    """
    grad_query_sH, grad_key_lH, grad_value_lH = grads
    scaled_query_sH, scaled_key_Hl = powers.query_sH * powers.scale, powers.key_lH.t().contiguous() * powers.scale
    grad_query_Hs = value_lH.new_empty(grad_sH.shape[::-1])
    grad_key, grad_value = (torch.zeros_like(value_lH, dtype=torch.float32) for _ in range(2))
    for queries in _blocks(len(grad_sH), len(value_lH)):
        powers_li = next(kept, None)
        if powers_li is None:
            powers_li = powers.of(queries)
        grad_value += torch.mm(powers_li, grad_sH[queries])
        grad_scores_li = _product(value_lH, grad_sH[queries], -mean_s[queries]).mul_(powers_li)
        grad_key += torch.mm(grad_scores_li, scaled_query_sH[queries])
        grad_query_Hs[:, queries] = torch.mm(scaled_key_Hl, grad_scores_li)
    grad_query_sH.copy_(grad_query_Hs.t())
    grad_key_lH.copy_(grad_key)
    grad_value_lH.copy_(grad_value)
