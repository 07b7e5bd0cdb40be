"""Self- and cross-attention of the DiT on a backend's parallel linear layers.

Megatron's own modules do not fit: its self-attention computes the cosines of the rotary angles anew in every layer, and
its cross-attention has no query and key norms and takes only text as wide as the model.

Letters: s = tokens of this rank (with sequence parallelism: of this rank's tensor-parallel group after the linear
layer's gather), L = text tokens, B = batch, D = hidden size, N = heads of this rank, H = channels per head.
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

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.recompute import recomputes_module, run_recomputed
from nemo_cosmos.diffusion.rope import apply_rope


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
        config: DiTConfig,
        submodules: SelfAttentionSubmodules | CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attention_type: str,
    ) -> None:
        super().__init__(config=config)
        self.groups = pg_collection
        self.head_dim = config.kv_channels
        self.q_layernorm = build_module(submodules.q_layernorm, config, self.head_dim, eps=config.layernorm_epsilon)
        self.k_layernorm = build_module(submodules.k_layernorm, config, self.head_dim, eps=config.layernorm_epsilon)
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type=attention_type,
            cp_comm_type=config.cp_comm_type,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.hidden_size,
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
        self, spec: ModuleSpec | type, config: DiTConfig, in_features: int, name: str, parts: int
    ) -> torch.nn.Module:
        return build_module(
            spec,
            in_features,
            parts * config.hidden_size,
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
                return self.core_attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
            # As in Megatron, whose kernels know packed sequences without a batch axis.
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            out = self.core_attention(
                query, key, value, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=limits
            )
            return out.reshape(len(out), 1, -1)

        if self.training and recomputes_module(self.config, "core_attn"):
            attended = run_recomputed(run, query, key, value, config=self.config)
        else:
            attended = run(query, key, value)
        return self.linear_proj(attended)[0]


class CosmosSelfAttention(_Attention):
    """Attention of all tokens to all tokens, with normed queries and keys and rotary positions.

    `linear_qkv` has Megatron's row order: for each head its query, key and value rows, so that a slice of rows is a
    slice of heads and checkpoints move between tensor-parallel sizes.
    """

    def __init__(
        self,
        config: DiTConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, "self")
        self.linear_qkv = self._column_linear(submodules.linear_qkv, config, config.hidden_size, "qkv", 3)

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
        qkv = rearrange(self.linear_qkv(x_sBD)[0], "s B (N three H) -> s B N three H", three=3, H=self.head_dim)
        query, key, value = qkv.unbind(dim=3)
        query, key = apply_rope(self.q_layernorm(query), rope), apply_rope(self.k_layernorm(key), rope)
        return self._attend(query, key, value.contiguous(), limits, tokens_shared)


class CosmosCrossAttention(_Attention):
    """Attention of all tokens to the text, with normed queries and keys; padding is not masked, as published.

    `linear_kv` has, for each head, its key rows and then its value rows.
    """

    def __init__(
        self,
        config: DiTConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, "cross")
        self.linear_q = self._column_linear(submodules.linear_q, config, config.hidden_size, "q", 1)
        # The text is whole on every rank: its layer must not gather pieces of it.
        whole_text = copy.copy(config)
        whole_text.sequence_parallel = False
        self.linear_kv = self._column_linear(submodules.linear_kv, whole_text, config.crossattn_emb_channels, "kv", 2)

    def forward(
        self, x_sBD: torch.Tensor, text_LBC: torch.Tensor, limits: PackedSeqParams | None = None
    ) -> torch.Tensor:
        """[s, B, D] -> [s, B, D]; `text_LBC` [L, B, crossattn_emb_channels], `limits` bounds packed clips and texts."""
        query = rearrange(self.linear_q(x_sBD)[0], "s B (N H) -> s B N H", H=self.head_dim)
        kv = rearrange(self.linear_kv(text_LBC)[0], "L B (N two H) -> L B N two H", two=2, H=self.head_dim)
        key, value = kv.unbind(dim=3)
        return self._attend(self.q_layernorm(query), self.k_layernorm(key), value.contiguous(), limits)
