"""Attention in bfloat16 on CPUs, from large matrix products.

torch's own kernel for CPUs (`scaled_dot_product_attention`) works on small tiles in bfloat16 and reaches half of what
the processor does in a large product of that type. Here one head's scores are made for a block of queries, or on the
way back of keys, against all others at once, so that nearly all time goes into such products; no more than a block of
scores is ever held.

Scores matter to the fraction of a unit, which bfloat16 has not where they are large. The forward pass multiplies
queries and keys in float32. The backward pass knows what the scores come to: its bfloat16 product starts from minus the
score of the keys that matter to a query, so that what is rounded there is small.

Letters: s = query tokens, l = key tokens, B = batch, N = heads, H = channels per head, i = a block of queries,
j = a block of keys.

Source: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 1 and B.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nemo_cosmos.parallel.tokens import AutogradContext

_MIN_SCORES = 2**19
"""Scores of a head from which on the products are large enough to be faster than torch's kernel."""
_BLOCK_SCORES = 2**21
"""Scores of a block: in float32 and bfloat16 they fit the last-level cache of a server's processor."""


def suits_blocks(query_sBNH: torch.Tensor, key_lBNH: torch.Tensor) -> bool:
    """Whether `blocked_attention` takes these and is the faster way."""
    num_scores = query_sBNH.shape[0] * key_lBNH.shape[0]
    on_cpu_in_bf16 = query_sBNH.device.type == "cpu" and query_sBNH.dtype == torch.bfloat16
    return on_cpu_in_bf16 and query_sBNH.shape[2] == key_lBNH.shape[2] and num_scores >= _MIN_SCORES


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
        num_queries, batch_size, num_heads, _ = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Of each query's scores in units of log 2: exp2 is several times faster than exp.
        normalisers = query.new_empty(batch_size, num_heads, num_queries, dtype=torch.float32)
        buffers = _Buffers(query, num_rows=num_queries, num_columns=len(key))
        for b, n in _heads(query):
            own_query, own_key, own_value = (x[:, b, n].contiguous() for x in (query, key, value))
            _attend(own_query, own_key, own_value, scale, buffers, out[:, b, n], normalisers[b, n])
        ctx.save_for_backward(query, key, value, out, normalisers)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: AutogradContext, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, normalisers = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        buffers = _Buffers(query, num_rows=len(key), num_columns=len(query))
        for b, n in _heads(query):
            own_tensors = [x[:, b, n].contiguous() for x in (query, key, value, out, grad_out)]
            head = _Head._make([*own_tensors, normalisers[b, n]])
            own = [grad[:, b, n] for grad in grads]
            _attend_backward(head, ctx.scale, buffers, grad_query_sH=own[0], grad_key_lH=own[1], grad_value_lH=own[2])
        return *grads, None


def _heads(query: torch.Tensor) -> list[tuple[int, int]]:
    return [(b, n) for b in range(query.shape[1]) for n in range(query.shape[2])]


class _Buffers:
    """Memory for a block of scores, made once: new pages of that size cost as much as the work on them."""

    def __init__(self, like: torch.Tensor, *, num_rows: int, num_columns: int) -> None:
        self.num_rows = min(num_rows, max(_BLOCK_SCORES // num_columns, 64))
        shape = (self.num_rows, num_columns)
        self.exact, self.exact_2 = (like.new_empty(shape, dtype=torch.float32) for _ in range(2))
        self.rounded = like.new_empty(shape)


def _attend(
    query_sH: torch.Tensor,
    key_lH: torch.Tensor,
    value_lH: torch.Tensor,
    scale: float,
    buffers: _Buffers,
    out_sH: torch.Tensor,
    normaliser_s: torch.Tensor,
) -> None:
    """Fills `out_sH` and `normaliser_s`, log2 of the sum of exp(scores)."""
    queries, keys_T = query_sH.float() * (scale * math.log2(math.e)), key_lH.float().t()
    for start in range(0, len(queries), buffers.num_rows):
        block = slice(start, start + buffers.num_rows)
        size = len(queries[block])
        scores_il = torch.mm(queries[block], keys_T, out=buffers.exact[:size])
        highest_i1 = scores_il.amax(dim=1, keepdim=True)
        powers_il = scores_il.sub_(highest_i1).exp2_()
        total_i1 = powers_il.sum(dim=1, keepdim=True)
        probabilities_il = buffers.rounded[:size].copy_(powers_il.div_(total_i1))
        out_sH[block] = torch.mm(probabilities_il, value_lH)
        normaliser_s[block] = (highest_i1 + total_i1.log2())[:, 0]


class _Head(NamedTuple):
    """What the forward pass of one head read and gave, and the gradient of its output."""

    query_sH: torch.Tensor
    key_lH: torch.Tensor
    value_lH: torch.Tensor
    out_sH: torch.Tensor
    grad_out_sH: torch.Tensor
    normaliser_s: torch.Tensor


def _attend_backward(
    head: _Head,
    scale: float,
    buffers: _Buffers,
    *,
    grad_query_sH: torch.Tensor,
    grad_key_lH: torch.Tensor,
    grad_value_lH: torch.Tensor,
) -> None:
    """Fills the three gradients."""
    query_sH, key_lH, value_lH, out_sH, grad_out_sH, normaliser_s = head
    to_log2 = scale * math.log2(math.e)
    normaliser_s = normaliser_s / to_log2
    minus_normaliser = _Shift(-normaliser_s, -_score_that_matters(query_sH, key_lH, normaliser_s, scale))
    mean_s = (grad_out_sH.float() * out_sH.float()).sum(dim=1)
    minus_mean = _Shift(-mean_s, -mean_s)
    grad_query = torch.zeros_like(query_sH, dtype=torch.float32)
    for start in range(0, len(key_lH), buffers.num_rows):
        block = slice(start, start + buffers.num_rows)
        keys, values = key_lH[block], value_lH[block]
        exact, exact_2, rounded = (x[: len(keys)] for x in (buffers.exact, buffers.exact_2, buffers.rounded))
        probabilities_js = minus_normaliser.plus_product(keys, query_sH, rounded, exact).mul_(to_log2).exp2_()
        grad_value_lH[block] = torch.mm(rounded.copy_(probabilities_js), grad_out_sH)
        grad_scores_js = minus_mean.plus_product(values, grad_out_sH, rounded, exact_2).mul_(probabilities_js)
        rounded.copy_(grad_scores_js.mul_(scale))
        grad_key_lH[block] = torch.mm(rounded, query_sH)
        grad_query += torch.mm(rounded.t(), keys).float()
    grad_query_sH.copy_(grad_query)


def _score_that_matters(
    query_sH: torch.Tensor, key_lH: torch.Tensor, normaliser_s: torch.Tensor, scale: float
) -> torch.Tensor:
    """About the mean score under the attention itself, before scaling; [s].

    Were scores normal with mean m and variance v, the normaliser would be m + v / 2 + log l and the wanted mean m + v.
    Where few keys have all the weight, that is too much, and their score the normaliser. A bad guess costs exactness
    only.
    """
    mean_s = query_sH.float() @ key_lH.float().mean(dim=0)
    return torch.minimum(2 * (normaliser_s - math.log(len(key_lH)) / scale) - mean_s, normaliser_s)


class _Shift:
    """A row that is added to a product: first a bfloat16 near it, before the product is rounded, then the rest."""

    def __init__(self, row_s: torch.Tensor, near_s: torch.Tensor) -> None:
        self._near_s = near_s.bfloat16()
        self._rest_s = row_s - self._near_s.float()

    def plus_product(
        self, left_jH: torch.Tensor, right_sH: torch.Tensor, rounded_js: torch.Tensor, exact_js: torch.Tensor
    ) -> torch.Tensor:
        """Puts row plus `left @ right.T` into `exact_js`, by way of `rounded_js`."""
        torch.addmm(self._near_s, left_jH, right_sH.t(), out=rounded_js)
        return exact_js.copy_(rounded_js).add_(self._rest_s)
