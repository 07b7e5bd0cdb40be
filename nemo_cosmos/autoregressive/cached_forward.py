"""The transformer on new tokens alone, with what attention needs of earlier ones kept.

Reads the model's own parameters, without Megatron's modules around them: on a CPU these cost as much time as the small
operations themselves.

Letters: B = batch, m = new tokens, S = tokens that fit, D = hidden size, L = text tokens, C = channels of one,
N = query heads of this rank, G = its key and value heads, R = N / G query heads to each, H = channels per head,
V = codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from nemo_cosmos.autoregressive.kv_cache import KVCache
from nemo_cosmos.autoregressive.layer_spec import ARLayer
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.positions import rope_tables, sincos_positions
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.few_rows import Layer, few_rows_linear, few_rows_rms_norm
from nemo_cosmos.parallel.tokens import CausalShard
from nemo_cosmos.transformer.positions import Grid


class _CrossAttention(NamedTuple):
    """Layers of a cross-attention; keys and values of text and actions, which are the same for all tokens."""

    norm: Layer
    q: Layer
    q_norm: Layer
    proj: Layer
    key_BGLH: Tensor
    value_BGLH: Tensor


class _Layer(NamedTuple):
    """The parts of a layer, and its cache."""

    norm: Layer
    qkv: Layer
    qk_norm: Tensor
    """[R + 1, H], float32: weights for the queries of a key head, then for itself, times sqrt(H)."""
    proj: Layer
    cross: _CrossAttention | None
    mlp_norm: Layer
    fc1: Layer
    fc2: Layer
    cache: KVCache


class _Places(NamedTuple):
    """Where the new tokens stand, and what follows from it for every layer."""

    cos: Tensor
    """[m, 1, 1, H] or [B, m, 1, 1, H], as all of these tables."""
    sin: Tensor
    """Of the channel with which each is turned, with its sign."""
    added: Tensor | None
    """[m, D] or [B, m, D]."""
    start: int | None
    """Of all samples alike; None where they differ."""
    places_Bm: Tensor | None
    """Where they differ."""
    end: int
    """Places of the cache that are attended to."""
    mask: Tensor | None
    """bool [1 or B, 1, R m, `end`]."""


class CachedForward:
    """What `CosmosAR.forward` computes, a few tokens at a time.

    Tensor-parallel ranks share heads and vocabulary as in training; context-parallel ranks each compute everything.

    Args:
        model: The transformer, whole but for tensor parallelism.
        grid: Tokens of the video along T, H, W.
        batch: B.
        length: S; places after the video's tokens count as padding.
        crossattn_emb_BLC: Text tokens, where the model takes text.
        actions_BFA: Scaled actions, where the model takes them.
        compile: Whether steps run through `torch.compile`, on GPUs in CUDA graphs: they then attend to the whole
            cache, as shapes must not change.

    Raises:
        UserError: The model is cut into pipeline stages, or text or actions do not fit it.
    """

    def __init__(
        self,
        model: CosmosAR,
        grid: Grid,
        *,
        batch: int,
        length: int,
        crossattn_emb_BLC: Tensor | None = None,
        actions_BFA: Tensor | None = None,
        compile: bool = False,  # noqa: A002 - the field's name for it
    ) -> None:
        if not (model.pre_process and model.post_process):
            raise user_error(
                "pipeline-parallel size",
                model.groups.pp.size(),
                "1 for decoding, where a stage would wait for the others at every token",
                "Load the checkpoint with tensor parallelism instead.",
            )
        config = model.config
        self.model, self.config, self.length = model, config, length
        self.tp_group, self.tp_size = model.groups.tp, model.groups.tp.size()
        self.embedding = model.embedding.weight
        self.linear = partial(few_rows_linear, compiled=compile)
        self.norm = partial(few_rows_rms_norm, eps=config.layernorm_epsilon, compiled=compile)
        self.final_norm = self.norm(model.final_layernorm.weight)
        tied = config.share_embeddings_and_output_weights
        self.output = self.linear(self.embedding if tied else model.output_layer.weight)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.num_heads = config.num_query_groups // self.tp_size
        self.queries_per_key = config.num_attention_heads // config.num_query_groups
        context_BLC = model.context(crossattn_emb_BLC, actions_BFA, self.dtype)
        context_LBC = None if context_BLC is None else context_BLC.transpose(0, 1).contiguous()
        self.layers = [self._layer(layer, batch, context_LBC) for layer in model.layers]
        shard = CausalShard(length)
        cos, sin = rope_tables(
            grid, config.kv_channels, config.rotary_base, config.yarn, shard, config.num_first, self.device
        )
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        # By which the norm of a head of zeros divides, and which adds to the length of others.
        self.least_length = torch.tensor(math.sqrt(config.kv_channels * config.layernorm_epsilon), device=self.device)
        self.added = None
        if config.extra_pos_embed == "sincos":
            self.added = sincos_positions(grid, config.hidden_size, shard, config.num_first, self.dtype, self.device)
            self.added = self.added.squeeze(1)
        self._compiled = None
        if compile:
            mode = "default"
            if self.device.type == "cuda":
                mode = "reduce-overhead"
                self._stay_in_place()
            self._compiled = torch.compile(self._run_at, mode=mode, fullgraph=True)

    def _layer(self, layer: ARLayer, batch: int, context_LBC: Tensor | None) -> _Layer:
        config, attention = self.config, layer.self_attention
        queries, keys = attention.q_layernorm.weight, attention.k_layernorm.weight
        cross = None
        if layer.takes_text:
            from_text = layer.cross_attention
            key, value = (x.permute(1, 2, 0, 3).contiguous() for x in from_text.project_text(context_LBC))
            cross = _CrossAttention(
                norm=self.norm(layer.pre_cross_attn_layernorm.weight),
                q=self.linear(from_text.linear_q.weight),
                q_norm=self.norm(from_text.q_layernorm.weight),
                proj=self.linear(from_text.linear_proj.weight),
                key_BGLH=key,
                value_BGLH=value,
            )
        return _Layer(
            norm=self.norm(layer.input_layernorm.weight),
            qkv=self.linear(attention.linear_qkv.weight),
            qk_norm=torch.stack([*[queries] * self.queries_per_key, keys]).float() * math.sqrt(config.kv_channels),
            proj=self.linear(attention.linear_proj.weight),
            cross=cross,
            mlp_norm=self.norm(layer.pre_mlp_layernorm.weight),
            fc1=self.linear(layer.mlp.linear_fc1.weight),
            fc2=self.linear(layer.mlp.linear_fc2.weight),
            cache=KVCache(batch, self.num_heads, self.length, config.kv_channels, dtype=self.dtype, device=self.device),
        )

    def _stay_in_place(self) -> None:
        """Tells the compiler that what is kept will not move: a CUDA graph may then write to it, and copies nothing."""
        kept = [self.cos, self.sin, self.least_length]
        kept += [] if self.added is None else [self.added]
        for layer in self.layers:
            kept += [layer.qk_norm, *layer.cache.tensors]
            kept += [] if layer.cross is None else [layer.cross.key_BGLH, layer.cross.value_BGLH]
        for tensor in kept:
            torch._dynamo.mark_static_address(tensor, guard=False)  # noqa: SLF001 - the public way, as torch documents it

    def __call__(self, tokens_Bm: Tensor, starts: Sequence[int]) -> Tensor:
        """Runs the transformer on tokens that follow those seen before; what was kept from there on is overwritten.

        Args:
            tokens_Bm: Token ids.
            starts: Place of every sample's first new token.

        Returns:
            What the output layer takes, [B, m, D].
        """
        first, num_new = starts[0], tokens_Bm.shape[1]
        if self._compiled is not None and max(starts) > 0:
            return self._compiled(tokens_Bm, torch.tensor(starts, device=self.device), self.length)
        if any(start != first for start in starts):
            return self._run_at(tokens_Bm, torch.tensor(starts, device=self.device), max(starts) + num_new)
        end = first + num_new
        mask = None
        if first > 0 and num_new > 1:
            mask = torch.ones(num_new, end, dtype=torch.bool, device=self.device).tril(first)
            mask = mask.repeat(self.queries_per_key, 1)[None, None]
        added = None if self.added is None else self.added[first:end]
        places = _Places(self.cos[first:end], self.sin[first:end], added, first, None, end, mask)
        return self._run(tokens_Bm, places)

    def logits(self, hidden_BmD: Tensor) -> Tensor:
        """Returns the logits of the codes, [B, m, V], whole on every rank."""
        logits = self.output(hidden_BmD.flatten(0, 1)).view(*hidden_BmD.shape[:2], -1)
        if self.tp_size > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return logits[..., : self.config.vocab_size]

    def _run_at(self, tokens_Bm: Tensor, starts_B: Tensor, end: int) -> Tensor:
        places_Bm = starts_B[:, None] + torch.arange(tokens_Bm.shape[1], device=self.device)
        mask_BmS = torch.arange(end, device=self.device) <= places_Bm[..., None]
        mask = mask_BmS[:, None].repeat(1, 1, self.queries_per_key, 1)
        added = None if self.added is None else self.added[places_Bm]
        return self._run(
            tokens_Bm, _Places(self.cos[places_Bm], self.sin[places_Bm], added, None, places_Bm, end, mask)
        )

    def _run(self, tokens_Bm: Tensor, places: _Places) -> Tensor:
        # Rows of all samples in one matrix, which products then need not flatten each time.
        batch, num_new = tokens_Bm.shape
        x = self._embed(tokens_Bm).flatten(0, 1)
        x_BmD = x.view(batch, num_new, -1)
        for layer in self.layers:
            if places.added is not None:
                x_BmD += places.added
            x += self._self_attention(x, layer, places, batch)
            if layer.cross is not None:
                x += self._cross_attention(x, layer.cross, batch)
            gate, up = layer.fc1(layer.mlp_norm(x)).chunk(2, dim=-1)
            x += self._sum(layer.fc2(functional.silu(gate, inplace=True).mul_(up)))
        return self.final_norm(x).view(batch, num_new, -1)

    def _embed(self, tokens_Bm: Tensor) -> Tensor:
        if self.tp_size == 1:
            return functional.embedding(tokens_Bm, self.embedding)
        own = tokens_Bm - self.tp_group.rank() * len(self.embedding)
        elsewhere = (own < 0) | (own >= len(self.embedding))
        embedded = functional.embedding(own.masked_fill(elsewhere, 0), self.embedding)
        return self._sum(embedded.masked_fill(elsewhere[..., None], 0))

    def _self_attention(self, x: Tensor, layer: _Layer, places: _Places, batch: int) -> Tensor:
        shape = (batch, len(x) // batch, self.num_heads, self.queries_per_key + 2, self.config.kv_channels)
        qkv = layer.qkv(layer.norm(x)).view(shape)
        turning = qkv.narrow(3, 0, shape[3] - 1)  # all but the values
        length = torch.linalg.vector_norm(turning, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self.least_length)
        qk = turning * layer.qk_norm
        # Each channel turns with the one half a head further. What the norm divides by, one number for each head, may
        # come last.
        ahead = qk.roll(shape[4] // 2, dims=-1)
        turning.copy_(qk.mul_(places.cos).addcmul_(ahead, places.sin).div_(length))
        query, key_and_value = qkv.narrow(3, 0, shape[3] - 2), qkv.narrow(3, shape[3] - 2, 2)
        if places.start is None:
            layer.cache.write_at(key_and_value, places.places_Bm)
        else:
            layer.cache.write(key_and_value, places.start)
        keys, values = layer.cache.read(places.end)
        if places.start == 0 and shape[1] > 1:
            attended = self._attend_all(query, keys, values)
        else:
            attended = self._attend(query, keys, values, places.mask)
        return self._sum(layer.proj(attended))

    def _cross_attention(self, x: Tensor, cross: _CrossAttention, batch: int) -> Tensor:
        shape = (batch, len(x) // batch, self.num_heads, self.queries_per_key, self.config.kv_channels)
        query = cross.q_norm(cross.q(cross.norm(x)).view(shape))
        return self._sum(cross.proj(self._attend(query, cross.key_BGLH, cross.value_BGLH, None)))

    def _attend(self, query_BmGRH: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B m, N H]. All queries of a key head stand in one matrix, so that keys and values are read once."""
        B, m, G, R, H = query_BmGRH.shape
        if m == 1:  # nothing to change places
            out = functional.scaled_dot_product_attention(
                query_BmGRH.squeeze(1), keys, values, attn_mask=mask, scale=self.config.softmax_scale
            )
            return out.reshape(B, G * R * H)  # no copy but where a kernel puts heads first
        query = query_BmGRH.permute(0, 2, 3, 1, 4).reshape(B, G, R * m, H)
        out = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=self.config.softmax_scale
        )
        return out.view(B, G, R, m, H).permute(0, 3, 1, 2, 4).reshape(B * m, G * R * H)

    def _attend_all(self, query_BmGRH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `_attend` where nothing came before: torch has kernels for the mask of this case."""
        out = functional.scaled_dot_product_attention(
            query_BmGRH.flatten(2, 3).transpose(1, 2),
            keys,
            values,
            is_causal=True,
            scale=self.config.softmax_scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _sum(self, x: Tensor) -> Tensor:
        """Adds up what the tensor-parallel ranks have."""
        return reduce_from_tensor_model_parallel_region(x, group=self.tp_group) if self.tp_size > 1 else x
