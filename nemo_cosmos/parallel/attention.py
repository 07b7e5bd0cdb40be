"""Core attention on torch's scaled dot product, with context parallelism.

Letters: S = query tokens of the whole sequence, L = key tokens, s, l = the tokens of this rank, B = batch,
N = query heads, G = key/value heads (of this tensor-parallel rank), H = channels per head, n = context-parallel ranks.

Under context parallelism the ranks hold contiguous pieces of the sequence, or under a causal mask one chunk from its
front and one from its end (see `tokens.py`). Self-attention exchanges heads for tokens by all-to-all (DeepSpeed
Ulysses, https://arxiv.org/abs/2309.14509) where the query heads divide by n; otherwise each rank keeps its queries and
either gathers all keys and values or passes them around (see `ring.py`). Packed sequences are exchanged by heads only:
a rank's piece begins and ends within them. Cross-attention exchanges nothing: the text is the same on every rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from einops import rearrange
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.blocked_attention import blocked_attention, suits_blocks
from nemo_cosmos.parallel.ring import ring_attention
from nemo_cosmos.parallel.tokens import AutogradContext, all_gather_first_axis, natural_order, zigzag

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_EXCHANGES = ("a2a", "all_gather", "p2p")
_KERNELS = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
"""Of CUDA devices, as fast as they were on an H100 with heads of 128 channels, and whether torch may use them. Its own
order begins with the second. What one cannot do, the next does."""


class SDPACoreAttention(MegatronModule):
    """Scaled-dot-product attention with the call signature of Megatron's core attention.

    Args:
        config: Model configuration.
        layer_number: Not used; part of Megatron's signature.
        attn_mask_type: `no_mask` or `causal`; a call may override it.
        attention_type: `self` or `cross`.
        attention_dropout: Probability; `config.attention_dropout` where None.
        softmax_scale: Factor on the scores; 1 / sqrt(H) where None.
        cp_comm_type: `a2a` (over heads), `all_gather` (of keys), `p2p` (a ring), or None: `a2a` where the heads divide,
            else `all_gather`.
        pg_collection: Process groups; `cp` is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if cp_comm_type not in (None, *_EXCHANGES):
            raise user_error("cp_comm_type", cp_comm_type, f"one of {_EXCHANGES} or None", "Only these run without TE.")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.cp_comm_type = cp_comm_type
        self.group = groups.cp
        self.may_exchange = attention_type == "self" and groups.cp is not None and groups.cp.size() > 1
        self.exchanges = self.may_exchange
        if self.exchanges and cp_comm_type == "p2p" and self.dropout > 0:
            raise user_error("attention_dropout", self.dropout, "0 with cp_comm_type 'p2p'", "Use 'all_gather'.")

    def share_tokens(self, shared: bool) -> None:
        """Says whether the context-parallel ranks share the next sequence, or each has one of its own."""
        self.exchanges = shared and self.may_exchange

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            query: [s, B, N, H]; [s, N, H] where sequences are packed.
            key: [l, B, G, H]; G divides N.
            value: Like `key`.
            attention_mask: Must be None; masks are told by type.
            attn_mask_type: Overrides the constructor's.
            attention_bias: Must be None.
            packed_seq_params: Bounds of packed sequences, each of which attends to its own keys; where context-parallel
                ranks share the tokens, those of the whole pack.

        Returns:
            [s, B, N * H]; [s, N * H] where sequences are packed.
        """
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("SDPACoreAttention takes no mask tensor and no bias")
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        if packed_seq_params is not None:
            return self._attend_packed(query[:, None], key[:, None], value[:, None], causal, packed_seq_params)[:, 0]
        if not self.exchanges:
            return self._attend(query, key, value, causal)
        if self.cp_comm_type == "p2p":
            return ring_attention(query, key, value, self.group, causal=causal, scale=self.softmax_scale)
        if self._by_heads(query.shape[2]):
            attend = self._attend_in_order if causal else functools.partial(self._attend, causal=False)
            return self._attend_over_heads(query, key, value, attend)
        key, value = (_GatherKeys.apply(x, self.group) for x in (key, value))
        return self._attend_chunks(query, key, value) if causal else self._attend(query, key, value, causal)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, packed: PackedSeqParams
    ) -> torch.Tensor:
        queries, keys = packed.cu_seqlens_q.diff().tolist(), packed.cu_seqlens_kv.diff().tolist()

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            sequences = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
            # One call for each sequence: masks over all of them would spend time on what they hide.
            return torch.cat([self._attend(*sequence, causal) for sequence in sequences if len(sequence[0])])

        if not self.exchanges:
            return attend(query, key, value)
        if not self._by_heads(query.shape[2]):
            raise NotImplementedError("packed sequences are shared by context-parallel ranks with all-to-all only")
        return self._attend_over_heads(query, key, value, attend)

    def _by_heads(self, num_heads: int) -> bool:
        divides = num_heads % self.group.size() == 0
        if self.cp_comm_type == "a2a" and not divides:
            raise user_error(
                "cp_comm_type",
                "a2a",
                f"heads per rank ({num_heads}) divisible by the context-parallel size {self.group.size()}",
                "Use 'p2p' or 'all_gather', or another layout.",
            )
        return divides and self.cp_comm_type in (None, "a2a")

    def _attend_over_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        if key.shape[2] % self.group.size():
            repeats = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        query, key, value = (tokens_from_heads(x, self.group) for x in (query, key, value))
        out = attend(query, key, value)
        return rearrange(
            heads_from_tokens(rearrange(out, "S B (N H) -> S B N H", N=query.shape[2]), self.group),
            "s B N H -> s B (N H)",
        )

    def _attend_in_order(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends, under a causal mask, tokens of the whole sequence that stand in the order of the ranks."""
        num_ranks = self.group.size()
        query, key, value = (natural_order(x, num_ranks) for x in (query, key, value))
        return zigzag(self._attend(query, key, value, causal=True), num_ranks)

    def _attend_chunks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends this rank's two chunks of queries each to the keys up to its own last one."""
        rank, num_ranks, length = self.group.rank(), self.group.size(), query.shape[0] // 2
        key, value = (natural_order(x, num_ranks) for x in (key, value))
        stops = [(chunk + 1) * length for chunk in (rank, 2 * num_ranks - 1 - rank)]
        chunks = zip(query.split(length), stops, strict=True)
        return torch.cat([self._attend(chunk, key[:stop], value[:stop], causal=True) for chunk, stop in chunks])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        """Attends; under a causal mask the last query is at the place of the last key."""
        if key.shape[2] != query.shape[2]:
            repeats = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        dropout = self.dropout if self.training else 0.0
        if not causal and dropout == 0 and suits_blocks(query, key, scale=self.softmax_scale):
            return blocked_attention(query, key, value, scale=self.softmax_scale).flatten(2)
        mask = None
        if causal and query.shape[0] != key.shape[0]:
            shape = (query.shape[0], key.shape[0])
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(key.shape[0] - query.shape[0])
        with _fastest_first() if query.is_cuda else contextlib.nullcontext():
            out = functional.scaled_dot_product_attention(
                rearrange(query, "s B N H -> B N s H"),
                rearrange(key, "l B N H -> B N l H"),
                rearrange(value, "l B N H -> B N l H"),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=self.softmax_scale,
            )
        return rearrange(out, "B N s H -> s B (N H)")


def _fastest_first() -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel([kernel for kernel, is_enabled in _KERNELS.items() if is_enabled()], set_priority=True)


def tokens_from_heads(x_sBNH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gives up heads for tokens: [s, B, N, H] on each of n ranks becomes [n s, B, N/n, H]."""
    blocks = rearrange(x_sBNH, "s B (n N) H -> n s B N H", n=group.size())
    return rearrange(_AllToAll.apply(blocks, group), "n s B N H -> (n s) B N H")


def heads_from_tokens(x_SBNH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Inverse of `tokens_from_heads`: [n s, B, N/n, H] becomes [s, B, N, H]."""
    blocks = rearrange(x_SBNH, "(n s) B N H -> n s B N H", n=group.size())
    return rearrange(_AllToAll.apply(blocks, group), "n s B N H -> s B (n N) H")


class _AllToAll(torch.autograd.Function):
    """Sends block i of axis 0 to rank i. It is its own transpose, hence its own backward pass."""

    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _GatherKeys(torch.autograd.Function):
    """Joins keys or values of all ranks. Every rank's queries use all of them, so the gradients are summed."""

    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather_first_axis(x, group)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None
