"""Attention whose keys and values pass around a ring of context-parallel ranks (Megatron's `cp_comm_type` "p2p").

Letters: s = query tokens of this rank, l = key tokens of one rank, B = batch, N = query heads, G = key/value heads,
r = query heads per key head, H = channels per head, n = ranks. Ranks hold contiguous pieces of the sequence, or under a
causal mask two chunks of it each (`tokens.CausalShard`), so that every rank has as much to do with every block.

No rank ever holds more than two ranks' keys, nor more scores than those of its own queries with one rank's keys. The
softmax over all keys is built up block by block: each block gives an output and the logarithm of its normaliser (lse),
and two of these are joined exactly. The backward pass sends the keys around again, and with them the gradients that the
ranks add to them.

Source: Liu et al., Ring Attention, https://arxiv.org/abs/2310.01889; the online softmax: Milakov and Gimelshein,
https://arxiv.org/abs/1805.02867; its backward pass: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135, B.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from einops import rearrange

from nemo_cosmos.parallel.tokens import AutogradContext


def ring_attention(
    query_sBNH: torch.Tensor,
    key_lBGH: torch.Tensor,
    value_lBGH: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attends this rank's queries to the keys of all ranks; computed in float32.

    Args:
        query_sBNH: Queries of this rank.
        key_lBGH: Keys of this rank; G divides N.
        value_lBGH: Values of this rank.
        group: The ranks, in the order of their tokens, or of their first chunks; all hold equally many.
        causal: Whether a token sees only itself and those before it.
        scale: Factor on the scores; 1 / sqrt(H) where None.

    Returns:
        [s, B, N * H], dtype of `query_sBNH`.
    """
    num_groups = key_lBGH.shape[2]
    query = rearrange(query_sBNH, "s B (G r) H -> B G r s H", G=num_groups)
    keys_values = torch.stack([rearrange(x, "l B G H -> B G 1 l H") for x in (key_lBGH, value_lBGH)])
    out = _RingAttention.apply(query, keys_values, group, causal, scale or query.shape[-1] ** -0.5)
    return rearrange(out, "B G r s H -> s B (G r H)").to(query_sBNH.dtype)


class _RingAttention(torch.autograd.Function):
    """Queries [B, G, r, s, H] and keys with values [2, B, G, 1, l, H] to outputs [B, G, r, s, H] in float32."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        query: torch.Tensor,
        keys_values: torch.Tensor,
        group: dist.ProcessGroup,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        scaled = query.float() * scale
        out = torch.zeros_like(scaled)
        lse = torch.full_like(scaled[..., :1], -torch.inf)
        for origin, (key, value) in _blocks(keys_values, group):
            queries, keys, diagonal = _visible(origin, group.rank(), query.shape[-2], key.shape[-2], causal)
            scores = _scores(scaled[..., queries, :], key[..., keys, :], diagonal)
            block_lse = scores.logsumexp(dim=-1, keepdim=True)
            joined = torch.logaddexp(lse[..., queries, :], block_lse)
            out[..., queries, :] *= (lse[..., queries, :] - joined).exp()
            out[..., queries, :] += (scores - joined).exp() @ value[..., keys, :].float()
            lse[..., queries, :] = joined
        ctx.save_for_backward(query, keys_values, out, lse)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return out

    @staticmethod
    def backward(ctx: AutogradContext, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys_values, out, lse = ctx.saved_tensors
        group, causal = ctx.group, ctx.causal
        scaled = query.float() * ctx.scale
        grad_out = grad_out.float()
        weighted_mean = (grad_out * out).sum(dim=-1, keepdim=True)
        grad_scaled = torch.zeros_like(scaled)
        # The gradient of a rank's keys travels with them: after n passes it is home, with every rank's part in it.
        grad_keys_values = torch.zeros_like(keys_values, dtype=torch.float32)
        for origin, (key, value) in _blocks(keys_values, group):
            queries, keys, diagonal = _visible(origin, group.rank(), query.shape[-2], key.shape[-2], causal)
            key, value = key[..., keys, :], value[..., keys, :].float()
            probabilities = (_scores(scaled[..., queries, :], key, diagonal) - lse[..., queries, :]).exp()
            grad_scores = probabilities * (grad_out[..., queries, :] @ value.mT - weighted_mean[..., queries, :])
            grad_scaled[..., queries, :] += grad_scores @ key.float()
            grad_key, grad_value = grad_keys_values[..., keys, :]
            grad_key += (grad_scores.mT @ scaled[..., queries, :]).sum(dim=2, keepdim=True)
            grad_value += (probabilities.mT @ grad_out[..., queries, :]).sum(dim=2, keepdim=True)
            grad_keys_values = _start_pass(grad_keys_values, group)()
        return (grad_scaled * ctx.scale).to(query.dtype), grad_keys_values.to(keys_values.dtype), None, None, None


def _visible(origin: int, rank: int, num_queries: int, num_keys: int, causal: bool) -> tuple[slice, slice, bool]:
    """Which of a rank's queries see which keys of another, and whether a triangular mask is between them.

    Of a rank that comes before, all see the chunk from the front alone; of one that comes after, those of the chunk
    from the end see both. So two ranks always have half of all pairs of their tokens.
    """
    if not causal or origin == rank:
        return slice(None), slice(None), causal
    if origin < rank:
        return slice(None), slice(num_keys // 2), False
    return slice(num_queries // 2, None), slice(None), False


def _scores(scaled: torch.Tensor, key: torch.Tensor, diagonal: bool) -> torch.Tensor:
    scores = scaled @ key.float().mT
    if diagonal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _blocks(keys_values: torch.Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives each rank's keys and values in turn, with that rank's number, own ones first.

    The next ones arrive while the caller works on what it was given.
    """
    for step in range(group.size()):
        receive = _start_pass(keys_values, group) if step < group.size() - 1 else None
        yield (group.rank() - step) % group.size(), keys_values
        if receive is not None:
            keys_values = receive()


def _start_pass(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Starts to send `x` to the next rank; the returned function waits for what the previous one sends."""
    sent, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    following, previous = (dist.get_global_rank(group, (group.rank() + step) % group.size()) for step in (1, -1))
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, following, group), dist.P2POp(dist.irecv, received, previous, group)]
    )

    def wait() -> torch.Tensor:
        for work in works:
            work.wait()
        return received

    return wait
