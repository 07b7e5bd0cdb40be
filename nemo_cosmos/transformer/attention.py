"""Self- and cross-attention with normed queries and keys, on a backend's parallel linear layers.

Megatron's own modules do not fit: its self-attention computes the cosines of the rotary angles anew in every layer, and
its cross-attention has no query and key norms, shares no keys, and takes only text as wide as the model.

Letters: s = tokens of this rank (with sequence parallelism: of this rank's tensor-parallel group after the linear
layer's gather), L = text tokens, B = batch, D = hidden size, N = query heads of this rank, G = its key and value heads,
of which each serves N / G queries, H = channels per head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from einops import rearrange
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.transformer.recompute import recomputes_module, run_recomputed
from nemo_cosmos.transformer.rotary import apply_rope


@dataclass
class CrossAttentionSubmodules:
    """What cross-attention is built from; Megatron's own lacks the norms."""

    linear_q: ModuleSpec | type
    linear_kv: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type


class _Attention(MegatronModule):
    """What both kinds share. Norms are named as Megatron's, which adds up their gradients over heads by that name."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules | CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attention_type: str,
        attn_mask_type: AttnMaskType,
    ) -> None:
        super().__init__(config=config)
        self.groups = pg_collection
        self.head_dim = config.kv_channels
        self.queries_per_key = config.num_attention_heads // config.num_query_groups
        self.attn_mask_type = attn_mask_type
        self.q_layernorm = build_module(submodules.q_layernorm, config, self.head_dim, eps=config.layernorm_epsilon)
        self.k_layernorm = build_module(submodules.k_layernorm, config, self.head_dim, eps=config.layernorm_epsilon)
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            cp_comm_type=config.cp_comm_type,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )

    def _column_linear(
        self, spec: ModuleSpec | type, config: TransformerConfig, in_features: int, name: str, heads: int
    ) -> torch.nn.Module:
        return build_module(
            spec,
            in_features,
            heads * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=self.groups.tp,
        )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        limits: PackedSeqParams | None,
        tokens_shared: bool = True,
    ) -> torch.Tensor:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            # Said at each call: a later batch's forward pass may come before this one's recomputation.
            self.core_attention.share_tokens(tokens_shared)
            if limits is None:
                return self.core_attention(query, key, value, None, attn_mask_type=self.attn_mask_type)
            # As in Megatron, whose kernels know packed sequences without a batch axis.
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            out = self.core_attention(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=limits
            )
            return out.reshape(len(out), 1, -1)

        if self.training and recomputes_module(self.config, "core_attn"):
            attended = run_recomputed(run, query, key, value, config=self.config)
        else:
            attended = run(query, key, value)
        return self.linear_proj(attended)[0]


class CosmosSelfAttention(_Attention):
    """Attention of tokens to tokens, with normed queries and keys and rotary positions.

    `linear_qkv` has Megatron's row order: for each key head the rows of its queries, its own, and the value's, so that
    a slice of rows is a slice of heads and checkpoints move between tensor-parallel sizes.

    Args:
        config: Sizes.
        submodules: From a layer spec.
        layer_number: Global number, from 1.
        pg_collection: Process groups; `tp` and `cp` are used.
        attn_mask_type: `no_mask` or `causal`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, "self", attn_mask_type)
        heads = config.num_attention_heads + 2 * config.num_query_groups
        self.linear_qkv = self._column_linear(submodules.linear_qkv, config, config.hidden_size, "qkv", heads)

    def forward(
        self,
        x_sBD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        limits: PackedSeqParams | None = None,
        tokens_shared: bool = True,
    ) -> torch.Tensor:
        """Attends.

        Args:
            x_sBD: Hidden states, normed.
            rope: Cosine and sine [s, 1 or B, 1, H / 2].
            limits: Bounds of packed clips.
            tokens_shared: Whether the context-parallel ranks share the sequence, or each has one of its own.

        Returns:
            [s, B, D].
        """
        return self._attend(*self.project(x_sBD, rope), limits, tokens_shared)

    def project(
        self, x_sBD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries [s, B, N, H], keys and values [s, B, G, H], normed and turned: what a cache would keep."""
        num_parts = self.queries_per_key + 2
        qkv = rearrange(self.linear_qkv(x_sBD)[0], "s B (G parts H) -> s B G parts H", parts=num_parts, H=self.head_dim)
        query, key, value = qkv.split([self.queries_per_key, 1, 1], dim=3)
        query, key = self.q_layernorm(query.flatten(2, 3)), self.k_layernorm(key.squeeze(3))
        return apply_rope(query, rope), apply_rope(key, rope), value.squeeze(3).contiguous()


class CosmosCrossAttention(_Attention):
    """Attention of all tokens to the text, with normed queries and keys; padding is not masked, as published.

    `linear_kv` has, for each key head, its key rows and then its value rows.

    Args:
        config: Sizes; `crossattn_emb_channels` is the width of a text token.
        submodules: From a layer spec.
        layer_number: Global number, from 1.
        pg_collection: Process groups; `tp` and `cp` are used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, "cross", AttnMaskType.no_mask)
        self.linear_q = self._column_linear(
            submodules.linear_q, config, config.hidden_size, "q", config.num_attention_heads
        )
        # The text is whole on every rank: its layer must not gather pieces of it.
        whole_text = copy.copy(config)
        whole_text.sequence_parallel = False
        self.linear_kv = self._column_linear(
            submodules.linear_kv, whole_text, config.crossattn_emb_channels, "kv", 2 * config.num_query_groups
        )

    def forward(
        self, x_sBD: torch.Tensor, text_LBC: torch.Tensor, limits: PackedSeqParams | None = None
    ) -> torch.Tensor:
        """[s, B, D] -> [s, B, D]; `text_LBC` [L, B, crossattn_emb_channels], `limits` bounds packed clips and texts."""
        query = rearrange(self.linear_q(x_sBD)[0], "s B (N H) -> s B N H", H=self.head_dim)
        return self._attend(self.q_layernorm(query), *self.project_text(text_LBC), limits)

    def project_text(self, text_LBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys, normed, and values of the text, [L, B, G, H]."""
        kv = rearrange(self.linear_kv(text_LBC)[0], "L B (G two H) -> L B G two H", two=2, H=self.head_dim)
        key, value = kv.unbind(dim=3)
        return self.k_layernorm(key), value.contiguous()
