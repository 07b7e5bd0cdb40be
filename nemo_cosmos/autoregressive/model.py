"""The Cosmos autoregressive transformer as a Megatron-core model.

Letters: B = batch, S = tokens of the whole sequence, s = tokens of this rank, D = hidden size, L = text tokens,
C = channels of a text token, F A = actions and their channels, V = codes, v = rows of the output layer on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint, make_viewless_tensor
from torch import nn

from nemo_cosmos.autoregressive.actions import ActionEmbedder
from nemo_cosmos.autoregressive.config import ARConfig, check_layout
from nemo_cosmos.autoregressive.initialization import initialize_weights
from nemo_cosmos.autoregressive.layer_spec import LayerInputs, ar_layer_spec
from nemo_cosmos.autoregressive.medusa import MedusaHeads
from nemo_cosmos.autoregressive.positions import rope_tables, sincos_positions
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import get_backend
from nemo_cosmos.parallel.cross_entropy import vocab_parallel_terms
from nemo_cosmos.parallel.linear import ColumnLinear
from nemo_cosmos.parallel.tokens import CausalShard, causal_shard, gather_tokens, natural_order
from nemo_cosmos.transformer.positions import Grid
from nemo_cosmos.transformer.recompute import run_blocks


class LabelTerms(NamedTuple):
    """The two terms of every token's cross entropy, log Z - logit; float32 [B, S] or [B, S, 1 + Medusa heads].

    They are whole on every rank.
    """

    log_z: torch.Tensor
    """Logarithm of the sum of all exponentiated logits."""
    logit: torch.Tensor
    """Of the label."""


class CosmosAR(MegatronModule):
    """The network that predicts the next token, on one pipeline stage.

    Context-parallel ranks share the tokens, in an order that balances causal attention (`parallel.tokens`). An output
    layer that is the embedding transposed stands on the last stage as a copy, which Megatron keeps the same. Needs
    Megatron's process groups, also on one rank.

    Args:
        config: Sizes and layout.
        pre_process: Whether this stage embeds the tokens.
        post_process: Whether this stage gives the prediction.
        vp_stage: Virtual stage, where the pipeline is interleaved.
        pg_collection: Process groups; Megatron's own where None.

    Raises:
        UserError: The layout cannot hold this model; raised before any weight is allocated.
    """

    def __init__(
        self,
        config: ARConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "dp_cp"])
        check_layout(config, groups.tp.size(), groups.pp.size(), groups.cp.size())
        super().__init__(config=config)
        self.groups = groups
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        self.input_tensor: torch.Tensor | None = None
        backend = get_backend(config.backend)

        if pre_process:
            self.embedding = VocabParallelEmbedding(
                config.num_embeddings,
                config.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        if config.action_dim is not None:
            self.action_embedder = ActionEmbedder(config.action_dim, config.crossattn_emb_channels, config.params_dtype)
        self.layer_offset = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        spec = ar_layer_spec(backend)
        self.layers = nn.ModuleList(
            build_module(spec, config=config, layer_number=self.layer_offset + i + 1, pg_collection=groups)
            for i in range(num_layers)
        )
        if post_process:
            self.final_layernorm = backend.rms_norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            # Megatron's with every backend: only it takes a weight that is the embedding's.
            self.output_layer = ColumnLinear(
                config.hidden_size,
                config.num_outputs,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.share_embeddings_and_output_weights and pre_process,
                tp_group=groups.tp,
            )
            if config.num_medusa_heads:
                self.medusa_heads = MedusaHeads(config, groups)
        initialize_weights(self.global_tensors(), config=config, groups=groups)
        self._mark_embeddings()

    def forward(
        self,
        tokens_BS: torch.Tensor,
        grid: Grid,
        crossattn_emb_BLC: torch.Tensor | None = None,
        *,
        labels_BS: torch.Tensor | None = None,
        actions_BFA: torch.Tensor | None = None,
    ) -> torch.Tensor | LabelTerms:
        """Predicts; all ranks of a tensor- and context-parallel group take and give whole sequences.

        Args:
            tokens_BS: Codes of a video, frame by frame and row by row; where the model has special tokens, the begin of
                video first. Padding may follow.
            grid: Tokens of the video along T, H, W.
            crossattn_emb_BLC: Text tokens, padding zeroed; where the model takes text.
            labels_BS: The token that each position is to predict, in [0, `vocab_size`); any, where none is. With the
                labels of the Medusa heads too [B, S, 1 + heads].
            actions_BFA: Scaled actions, see `transformer.actions`; where the model takes them, may be left out: there
                are none of a picture.

        Returns:
            On the last pipeline stage `LabelTerms` of the labels' shape where these are given, else the logits
            [B, S, V]; on others the hidden states for the next one.

        Raises:
            UserError: A size does not fit the model or the layout.
        """
        config, groups = self.config, self.groups
        self._check(tokens_BS, grid)
        shard = causal_shard(tokens_BS.shape[1], groups, sequence_parallel=config.sequence_parallel)
        positions_s = shard.positions(tokens_BS.device)
        hidden = self._embed(tokens_BS[:, positions_s]) if self.pre_process else self.input_tensor
        inputs = self._layer_inputs(grid, shard, self.context(crossattn_emb_BLC, actions_BFA, hidden.dtype), hidden)
        hidden = run_blocks(list(self.layers), hidden, inputs, config=config)
        if not self.post_process:
            return make_viewless_tensor(hidden, requires_grad=True, keep_graph=True)
        hidden = self.final_layernorm(hidden)
        if labels_BS is None:
            logits_sBV = gather_from_tensor_model_parallel_region(self._logits(hidden), group=groups.tp)
            return self._join(logits_sBV[..., : config.vocab_size]).transpose(0, 1)
        if labels_BS.ndim == 2:
            return self._label_terms(hidden, labels_BS[:, positions_s])
        predictions = zip([hidden, *self.medusa_heads(hidden)], labels_BS[:, positions_s].unbind(-1), strict=True)
        terms = [self._label_terms(hidden, labels_Bs) for hidden, labels_Bs in predictions]
        return LabelTerms(*(torch.stack(term, dim=-1) for term in zip(*terms, strict=True)))

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Takes the hidden states that the previous pipeline stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The embedding's weight, or its copy on the last stage; where they are shared Megatron adds up gradients."""
        if self.pre_process:
            return self.embedding.weight
        return self.output_layer.weight if self.post_process else None

    def context(
        self, crossattn_emb_BLC: torch.Tensor | None, actions_BFA: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Joins what cross-attention looks at: the tokens of the text and of the actions.

        Args:
            crossattn_emb_BLC: See `forward`.
            actions_BFA: See `forward`.
            dtype: Of the result.

        Returns:
            [B, L + F, C]; None for a model without text.

        Raises:
            UserError: The model does not take one of them, or asks for another width.
        """
        config = self.config
        channels = None if crossattn_emb_BLC is None else crossattn_emb_BLC.shape[-1]
        if channels != config.crossattn_emb_channels:
            expected = "None" if config.crossattn_emb_channels is None else f"[B, L, {config.crossattn_emb_channels}]"
            got = None if crossattn_emb_BLC is None else tuple(crossattn_emb_BLC.shape)
            raise user_error("crossattn_emb_BLC", got, expected, "Use the encoder that the model was trained with.")
        if actions_BFA is not None and actions_BFA.shape[2:] != (config.action_dim,):
            expected = "None" if config.action_dim is None else f"[B, F, {config.action_dim}]"
            raise user_error(
                "actions_BFA", tuple(actions_BFA.shape), expected, "Build the model with their action_dim."
            )
        if crossattn_emb_BLC is None or actions_BFA is None:
            return None if crossattn_emb_BLC is None else crossattn_emb_BLC.to(dtype)
        return torch.cat([crossattn_emb_BLC.to(dtype), self.action_embedder(actions_BFA.to(dtype))], dim=1)

    def _check(self, tokens_BS: torch.Tensor, grid: Grid) -> None:
        least = self.config.num_first + math.prod(grid)
        if tokens_BS.shape[1] < least:
            raise user_error(
                "tokens_BS", tuple(tokens_BS.shape), f"[B, {least} or more] for a grid {grid}", "Give whole videos."
            )

    def _embed(self, tokens_Bs: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(tokens_Bs)
        # With sequence parallelism the layer has already put the tokens first and given each rank its own.
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def _layer_inputs(
        self, grid: Grid, shard: CausalShard, text_BLC: torch.Tensor | None, hidden: torch.Tensor
    ) -> LayerInputs:
        config, device, positions = self.config, hidden.device, None
        if config.extra_pos_embed == "sincos":
            positions = sincos_positions(grid, config.hidden_size, shard, config.num_first, hidden.dtype, device)
            if config.sequence_parallel:
                positions = positions.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        return LayerInputs(
            # Linear layers gather what sequence parallelism splits: attention sees the whole context-parallel piece.
            rope=rope_tables(
                grid, config.kv_channels, config.rotary_base, config.yarn, shard, config.num_first, device
            ),
            positions_s1D=positions,
            text_LBC=None if text_BLC is None else text_BLC.transpose(0, 1).to(hidden.dtype).contiguous(),
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part, [s, B, v]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0]

    def _label_terms(self, hidden: torch.Tensor, labels_Bs: torch.Tensor) -> LabelTerms:
        terms_sB = vocab_parallel_terms(
            self._logits(hidden), labels_Bs.T, self.groups.tp, vocab_size=self.config.vocab_size
        )
        return LabelTerms(*self._join(torch.stack(terms_sB, dim=-1)).permute(2, 1, 0))

    def _join(self, x_sB: torch.Tensor) -> torch.Tensor:
        """Joins the context-parallel ranks' tokens, in the order of the sequence."""
        return natural_order(gather_tokens(x_sB, self.groups, sequence_parallel=False), self.groups.cp.size())

    def global_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers under the names they have on one rank."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                name = f"layers.{self.layer_offset + int(index)}.{rest}"
            elif name == "output_layer.weight" and self.share_embeddings_and_output_weights:
                name = "embedding.weight"
            yield name, tensor

    def _mark_embeddings(self) -> None:
        """Marks the vocabulary's weights as Megatron's optimizer, gradient reduction and clipping look for them."""
        for name, parameter in self.named_parameters():
            parameter.is_embedding_or_output_parameter = name in ("embedding.weight", "output_layer.weight")
        weight = self.shared_embedding_or_output_weight()
        if not self.share_embeddings_and_output_weights or weight is None:
            return
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True  # two layers add to one gradient
        else:
            weight.shared_embedding = True
            weight.shared = not self.pre_process  # the copy, which norms do not count

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describes the weights for Megatron's distributed checkpoints; layers are numbered over all stages."""
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            if name != "layers":
                sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        for index, layer in enumerate(self.layers):
            local = f"{prefix}layers.{index}."
            part = sharded_state_dict_default(layer, local, sharded_offsets, metadata)
            replace_prefix_for_sharding(part, local, f"{prefix}layers.{self.layer_offset + index}.")
            sharded.update(part)
        if self.share_embeddings_and_output_weights and self.post_process and not self.pre_process:
            sharded[f"{prefix}output_layer.weight"] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.output_layer.weight,
                key=f"{prefix}embedding.weight",
                replica_id=(1, 0, self.groups.dp_cp.rank()),  # a copy of what the first stage writes
                allow_shape_mismatch=True,
            )
        return sharded
