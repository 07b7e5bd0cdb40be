"""One layer of the autoregressive transformer, and the spec that fills it from a backend.

Letters: s = tokens of this rank, L = text tokens, B = batch, D = hidden size, C = channels of a text token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.parallel.backend import Backend
from nemo_cosmos.transformer.attention import CosmosCrossAttention, CosmosSelfAttention, CrossAttentionSubmodules
from nemo_cosmos.transformer.recompute import recomputes_module, run_recomputed


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What every layer reads besides the hidden states; computed once per forward pass."""

    rope: tuple[torch.Tensor, torch.Tensor]
    """Cosine and sine of the rotary angles."""
    positions_s1D: torch.Tensor | None
    """Positions added at every layer's input."""
    text_LBC: torch.Tensor | None
    """Text tokens, where the model takes text."""


@dataclass
class ARLayerSubmodules:
    """What a layer is built from."""

    norm: ModuleSpec | type
    self_attention: ModuleSpec | type
    cross_attention: ModuleSpec | type
    mlp: ModuleSpec | type


class ARLayer(MegatronModule):
    """Causal self-attention, cross-attention where the model takes text, and MLP, each behind its own norm.

    Args:
        config: Sizes.
        submodules: From `ar_layer_spec`.
        layer_number: Global number, from 1.
        pg_collection: Process groups; `tp` and `cp` are used.
    """

    def __init__(
        self,
        config: ARConfig,
        submodules: ARLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.takes_text = config.crossattn_emb_channels is not None
        attention = {"config": config, "layer_number": layer_number, "pg_collection": pg_collection}

        def norm() -> torch.nn.Module:
            return build_module(submodules.norm, config, config.hidden_size, eps=config.layernorm_epsilon)

        self.input_layernorm = norm()
        self.self_attention = build_module(submodules.self_attention, **attention)
        if self.takes_text:
            self.pre_cross_attn_layernorm = norm()
            self.cross_attention = build_module(submodules.cross_attention, **attention)
        self.pre_mlp_layernorm = norm()
        self.mlp = build_module(
            submodules.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
        )

    def forward(self, x_sBD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[s, B, D] -> [s, B, D]."""
        if inputs.positions_s1D is not None:
            x_sBD = x_sBD + inputs.positions_s1D
        x_sBD = x_sBD + self.self_attention(self.input_layernorm(x_sBD), inputs.rope)
        if self.takes_text:
            x_sBD = x_sBD + self.cross_attention(self.pre_cross_attn_layernorm(x_sBD), inputs.text_LBC)
        return x_sBD + self._mlp(self.pre_mlp_layernorm(x_sBD))

    def _mlp(self, x_sBD: torch.Tensor) -> torch.Tensor:
        def run(x_sBD: torch.Tensor) -> torch.Tensor:
            return self.mlp(x_sBD)[0]

        if self.training and recomputes_module(self.config, "mlp"):
            return run_recomputed(run, x_sBD, config=self.config)
        return run(x_sBD)


def ar_layer_spec(backend: Backend) -> ModuleSpec:
    """Returns the layer with the backend's linear layers, norms and attention."""
    return ModuleSpec(
        module=ARLayer,
        submodules=ARLayerSubmodules(
            norm=backend.rms_norm,
            self_attention=ModuleSpec(
                module=CosmosSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_linear,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear,
                    q_layernorm=backend.rms_norm,
                    k_layernorm=backend.rms_norm,
                ),
            ),
            cross_attention=ModuleSpec(
                module=CosmosCrossAttention,
                submodules=CrossAttentionSubmodules(
                    linear_q=backend.column_linear,
                    linear_kv=backend.column_linear,
                    q_layernorm=backend.rms_norm,
                    k_layernorm=backend.rms_norm,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear,
                ),
            ),
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear)
            ),
        ),
    )
