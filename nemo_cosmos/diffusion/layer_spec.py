"""One block of the DiT, and the spec that fills it from a backend.

Letters: s = tokens of this rank, B = batch, D = hidden size, F = 1, frames of this rank, or s (see `adaln.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from nemo_cosmos.diffusion.adaln import AdaLNLoRA, add_gated, modulate
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.parallel.backend import Backend
from nemo_cosmos.transformer.attention import CosmosCrossAttention, CosmosSelfAttention, CrossAttentionSubmodules
from nemo_cosmos.transformer.recompute import recomputes_module, run_recomputed


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What every block reads besides the hidden states; computed once per forward pass."""

    emb_FBD: torch.Tensor
    """Time embedding after SiLU."""
    shared_FBC: torch.Tensor
    """Vector of width 3 D that all adaptive norms share."""
    num_tokens: int
    """Tokens of this rank."""
    tokens_per_frame: torch.Tensor | None
    """Tokens of this rank in each of its F frames, or clips of a pack, where they are not equally many; int64 [F]."""
    text_LBC: torch.Tensor
    """Text tokens."""
    rope: tuple[torch.Tensor, torch.Tensor]
    """Cosine and sine of the rotary angles."""
    positions_s1D: torch.Tensor | None
    """Positions added at every block's input."""
    tokens_shared: bool
    """Whether the context-parallel ranks share the sequence."""
    limits: tuple[PackedSeqParams | None, PackedSeqParams | None] = (None, None)
    """Bounds of packed clips, for self-attention and for cross-attention."""

    def modulation(self, adaln: AdaLNLoRA) -> tuple[torch.Tensor, ...]:
        """Shift, scale and, for blocks, gate; each with one row for all tokens, per frame, or per token."""
        vectors = adaln(self.emb_FBD, self.shared_FBC)
        if self.tokens_per_frame is None:
            return vectors
        return tuple(v.repeat_interleave(self.tokens_per_frame, dim=0, output_size=self.num_tokens) for v in vectors)


@dataclass
class DiTBlockSubmodules:
    """What a block is built from."""

    self_attention: ModuleSpec | type
    cross_attention: ModuleSpec | type
    mlp: ModuleSpec | type


class DiTBlock(MegatronModule):
    """Self-attention, cross-attention and MLP, each behind its own adaptive norm and gate.

    Args:
        config: Sizes.
        submodules: From `dit_block_spec`.
        layer_number: Global number, from 1.
        pg_collection: Process groups; `tp` and `cp` are used.
    """

    def __init__(
        self,
        config: DiTConfig,
        submodules: DiTBlockSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.adaln_self_attention = AdaLNLoRA(config, num_chunks=3)
        self.self_attention = build_module(
            submodules.self_attention, config=config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.adaln_cross_attention = AdaLNLoRA(config, num_chunks=3)
        self.cross_attention = build_module(
            submodules.cross_attention, config=config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.adaln_mlp = AdaLNLoRA(config, num_chunks=3)
        self.mlp = build_module(
            submodules.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
        )

    def forward(self, x_sBD: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """[s, B, D] -> [s, B, D]."""
        eps = self.config.layernorm_epsilon
        if inputs.positions_s1D is not None:
            x_sBD = x_sBD + inputs.positions_s1D
        shift, scale, gate = inputs.modulation(self.adaln_self_attention)
        attended = self.self_attention(
            modulate(x_sBD, shift, scale, eps), inputs.rope, inputs.limits[0], inputs.tokens_shared
        )
        x_sBD = add_gated(x_sBD, gate, attended)
        shift, scale, gate = inputs.modulation(self.adaln_cross_attention)
        attended = self.cross_attention(modulate(x_sBD, shift, scale, eps), inputs.text_LBC, inputs.limits[1])
        x_sBD = add_gated(x_sBD, gate, attended)
        shift, scale, gate = inputs.modulation(self.adaln_mlp)
        return add_gated(x_sBD, gate, self._mlp(modulate(x_sBD, shift, scale, eps)))

    def _mlp(self, x_sBD: torch.Tensor) -> torch.Tensor:
        def run(x_sBD: torch.Tensor) -> torch.Tensor:
            return self.mlp(x_sBD)[0]

        if self.training and recomputes_module(self.config, "mlp"):
            return run_recomputed(run, x_sBD, config=self.config)
        return run(x_sBD)


def dit_block_spec(backend: Backend) -> ModuleSpec:
    """Returns the block with the backend's linear layers, norms and attention."""
    return ModuleSpec(
        module=DiTBlock,
        submodules=DiTBlockSubmodules(
            self_attention=ModuleSpec(
                module=CosmosSelfAttention,
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
