"""The Cosmos diffusion transformer as a Megatron-core model.

Letters: B = batch, C = channels, T H W = latent frames, rows, columns, S = tokens of the whole sequence, s = tokens of
this rank, D = hidden size, L = text tokens, F = groups of tokens that share their modulation, P = values of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from nemo_cosmos.diffusion.adaln import AdaLNLoRA, modulate
from nemo_cosmos.diffusion.config import DiTConfig, check_layout, check_variable_lengths
from nemo_cosmos.diffusion.embeddings import (
    ConditionEmbedder,
    LearnablePositions,
    PatchEmbed,
    UncertaintyHead,
    linear,
    unpatchify,
)
from nemo_cosmos.diffusion.initialization import initialize_weights, tensor_parallel_axis
from nemo_cosmos.diffusion.layer_spec import BlockInputs, dit_block_spec
from nemo_cosmos.diffusion.packing import Pack, check_pack
from nemo_cosmos.diffusion.rope import rope_tables
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import get_backend
from nemo_cosmos.parallel.tokens import TokenShard, count_once, gather_tokens, split_tokens, token_shard

Fps = float | torch.Tensor | None

_ON_EVERY_STAGE = ("conditioning.", "extra_pos_embedder.")
"""Modules that each pipeline stage holds a copy of."""


class FinalLayer(nn.Module):
    """Adaptive norm without gate, and the linear layer to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.adaln = AdaLNLoRA(config, num_chunks=2)
        self.linear = linear(config.hidden_size, config.patch_volume * config.out_channels, config)

    def forward(self, x_sBD: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """[s, B, D] -> [s, B, P]."""
        shift, scale = inputs.modulation(self.adaln)
        return self.linear(modulate(x_sBD, shift, scale, self.eps))


class CosmosDiT(MegatronModule):
    """The network F of the EDM denoiser, on one pipeline stage.

    Time, actions and positions are embedded anew on every stage from the batch, so that only hidden states cross
    between stages. Needs Megatron's process groups, also on one rank.

    Args:
        config: Sizes and layout.
        pre_process: Whether this stage embeds the latent.
        post_process: Whether this stage gives the prediction.
        vp_stage: Virtual stage, where the pipeline is interleaved.
        pg_collection: Process groups; Megatron's own where None.

    Raises:
        UserError: The layout cannot hold this model; raised before any weight is allocated.
    """

    def __init__(
        self,
        config: DiTConfig,
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
        self.share_embeddings_and_output_weights = False
        self.input_tensor: torch.Tensor | None = None
        backend = get_backend(config.backend)

        if pre_process:
            self.x_embedder = PatchEmbed(config)
        self.conditioning = ConditionEmbedder(config, backend)
        if config.extra_pos_embed == "learnable":
            self.extra_pos_embedder = LearnablePositions(config)
        self.layer_offset = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        spec = dit_block_spec(backend)
        self.blocks = nn.ModuleList(
            build_module(spec, config=config, layer_number=self.layer_offset + i + 1, pg_collection=groups)
            for i in range(num_layers)
        )
        if post_process:
            self.final_layer = FinalLayer(config)
            self.logvar_head = UncertaintyHead(config)
        initialize_weights(
            self.global_tensors(),
            seed=config.init_seed,
            qk_norm=config.init_qk_norm,
            groups=groups,
            draw=config.perform_initialization,
        )
        self._mark_replicated_parameters()

    def forward(
        self,
        x_BCTHW: torch.Tensor | list[torch.Tensor],
        timesteps_B: torch.Tensor,
        crossattn_emb_BLD: torch.Tensor,
        *,
        fps: Fps = None,
        padding_mask_B1HW: torch.Tensor | None = None,
        condition_mask_B1THW: torch.Tensor | list[torch.Tensor] | None = None,
        actions_BTA: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Predicts; all ranks of a tensor- and context-parallel group take and give the whole latent.

        Clips of different sizes may be packed into one sequence, in which each attends to itself and to its own text:
        then latents and condition masks are lists of one clip each, B is their number everywhere else, and there are
        neither actions nor padding masks.

        Args:
            x_BCTHW: Noisy latent times c_in; every stage needs it for its shape. A list of 1 C T H W packs.
            timesteps_B: c_noise of each sample.
            crossattn_emb_BLD: Text tokens, padding zeroed.
            fps: Frames per second, one number or one per sample; None (images) numbers frames as they come.
            padding_mask_B1HW: 1 where a pixel is padding, at any resolution; None means nowhere.
            condition_mask_B1THW: 1 where the latent is given, broadcastable; None means nowhere. A list in a pack.
            actions_BTA: [B, T, action_dim * action_frames_per_latent], or None.

        Returns:
            B C T H W, or a list of 1 C T H W for a pack, on the last pipeline stage; hidden states s B D on others.

        Raises:
            UserError: A size does not fit the model or the layout.
        """
        is_packed = isinstance(x_BCTHW, list)
        clips = x_BCTHW if isinstance(x_BCTHW, list) else [x_BCTHW]
        masks = condition_mask_B1THW if isinstance(condition_mask_B1THW, list) else [condition_mask_B1THW] * len(clips)
        if is_packed:
            self._check_pack(clips, timesteps_B, crossattn_emb_BLD, fps, masks, padding_mask_B1HW, actions_BTA)
        pack = Pack(grids=tuple(self.config.token_grid(tuple(clip.shape[2:])) for clip in clips))
        sequence_parallel = self.config.sequence_parallel
        shard = token_shard(sum(pack.lengths), self.groups, sequence_parallel=sequence_parallel)
        if is_packed:
            inputs = self._packed_block_inputs(timesteps_B, crossattn_emb_BLD, pack, shard, fps)
        else:
            self.conditioning.check_actions(actions_BTA, len(clips[0]), clips[0].shape[2])
            inputs = self._block_inputs(timesteps_B, crossattn_emb_BLD, pack, shard, fps, actions_BTA)
        if self.pre_process:
            patches = [
                self.x_embedder.tokens(clip, mask, padding_mask_B1HW) for clip, mask in zip(clips, masks, strict=True)
            ]
            patches_SBP = torch.cat(patches) if is_packed else patches[0]
            hidden = self.x_embedder(split_tokens(patches_SBP, self.groups, sequence_parallel=sequence_parallel))
        else:
            hidden = self.input_tensor
        for index, block in enumerate(self.blocks):
            hidden = self._run_block(index, block, hidden, inputs)
        if not self.post_process:
            return make_viewless_tensor(hidden, requires_grad=True, keep_graph=True)
        patches_SBP = gather_tokens(self.final_layer(hidden, inputs), self.groups, sequence_parallel=sequence_parallel)
        predicted = [
            unpatchify(patches, grid, self.config.patch_size)
            for patches, grid in zip(patches_SBP.split(pack.lengths), pack.grids, strict=True)
        ]
        return predicted if is_packed else predicted[0]

    def logvar(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        """Predicted log-variance of the loss at each sample's c_noise; float32 [B], on the last stage only."""
        return count_once(self.logvar_head(timesteps_B), self.groups.cp)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Takes the hidden states that the previous pipeline stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _block_inputs(
        self,
        timesteps_B: torch.Tensor,
        text_BLD: torch.Tensor,
        pack: Pack,
        shard: TokenShard,
        fps: Fps,
        actions_BTA: torch.Tensor | None,
    ) -> BlockInputs:
        """What blocks read of a batch of clips of one size."""
        self._check_text(text_BLD)
        per_frame = pack.grids[0][1] * pack.grids[0][2]
        frames = _frames_of(shard, per_frame)
        emb_FBD, shared_FBC = self.conditioning(timesteps_B, actions_BTA, frames)
        return BlockInputs(
            emb_FBD=emb_FBD,
            shared_FBC=shared_FBC,
            tokens_per_frame=_uneven_frames(shard, per_frame, frames, text_BLD.device) if len(emb_FBD) > 1 else None,
            text_LBC=rearrange(text_BLD, "B L C -> L B C").to(emb_FBD.dtype).contiguous(),
            rope=self._rope(pack, [_frame_steps(fps, self.config.base_fps)], text_BLD.device),
            positions_s1D=self._positions(pack, shard),
        )

    def _packed_block_inputs(
        self, timesteps_B: torch.Tensor, text_BLD: torch.Tensor, pack: Pack, shard: TokenShard, fps: Fps
    ) -> BlockInputs:
        """What blocks read of packed clips: each has modulation, text, positions and frames per second of its own."""
        self._check_text(text_BLD)
        pieces = pack.pieces(shard)
        present = slice(pieces[0][0], pieces[-1][0] + 1)
        emb_1BD, shared_1BC = self.conditioning(timesteps_B[present], None, slice(0))
        rates = fps.tolist() if isinstance(fps, torch.Tensor) else [fps] * len(pack.grids)
        return BlockInputs(
            emb_FBD=emb_1BD.transpose(0, 1),
            shared_FBC=shared_1BC.transpose(0, 1),
            tokens_per_frame=torch.tensor([len(piece) for _, piece in pieces], device=text_BLD.device),
            text_LBC=rearrange(text_BLD, "B L C -> (B L) 1 C").to(emb_1BD.dtype).contiguous(),
            rope=self._rope(pack, [_frame_steps(rate, self.config.base_fps) for rate in rates], text_BLD.device),
            positions_s1D=self._positions(pack, shard),
            limits=pack.attention_limits(text_BLD.shape[1], text_BLD.device),
        )

    def _rope(
        self, pack: Pack, frame_steps: list[tuple[float, ...]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Linear layers gather what sequence parallelism splits: attention sees the whole context-parallel piece.
        attended = token_shard(sum(pack.lengths), self.groups, sequence_parallel=False)
        tables = [
            rope_tables(
                pack.grids[index],
                self.config.kv_channels,
                self.config.rope_ratio,
                frame_steps[index],
                (piece.start, piece.stop),
                device,
            )
            for index, piece in pack.pieces(attended)
        ]
        if len(tables) == 1:
            return tables[0]
        cosines, sines = zip(*tables, strict=True)
        return torch.cat(cosines), torch.cat(sines)

    def _positions(self, pack: Pack, shard: TokenShard) -> torch.Tensor | None:
        if self.config.extra_pos_embed is None:
            return None
        parts = []
        for index, piece in pack.pieces(shard):
            grid = pack.grids[index]
            parts.append(self.extra_pos_embedder(grid, piece, _frames_of(piece, grid[1] * grid[2])))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _check_text(self, text_BLD: torch.Tensor) -> None:
        if text_BLD.ndim != 3 or text_BLD.shape[-1] != self.config.crossattn_emb_channels:
            expected = f"[batch, tokens, {self.config.crossattn_emb_channels}]"
            raise user_error(
                "crossattn_emb_BLD", tuple(text_BLD.shape), expected, "Use the encoder it was trained with."
            )

    def _check_pack(
        self,
        clips: list[torch.Tensor],
        timesteps_B: torch.Tensor,
        text_BLD: torch.Tensor,
        fps: Fps,
        masks: list[torch.Tensor | None],
        padding_mask: torch.Tensor | None,
        actions: torch.Tensor | None,
    ) -> None:
        if padding_mask is not None or actions is not None:
            raise user_error("padding mask and actions of a pack", "given", "None", "Train on batches of one size.")
        check_pack(
            clips,
            {
                "timesteps_B": len(timesteps_B),
                "crossattn_emb_BLD": len(text_BLD),
                "fps": len(fps) if isinstance(fps, torch.Tensor) else None,
                "condition_mask_B1THW": len(masks),
            },
            context_parallel=self.groups.cp.size(),
        )
        check_variable_lengths(self.config, self.groups.pp.size())

    def _run_block(self, index: int, block: nn.Module, hidden: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        config = self.config
        recompute = config.recompute_granularity == "full" and torch.is_grad_enabled()
        if recompute and config.recompute_method == "block":
            recompute = index < config.recompute_num_layers
        if not recompute:
            return block(hidden, inputs)
        # No random numbers are drawn in a block, so there is no random state to keep.
        return checkpoint(block, hidden, inputs, use_reentrant=False, preserve_rng_state=config.attention_dropout > 0)

    def global_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers under the names they have on one rank."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                name = f"blocks.{self.layer_offset + int(index)}.{rest}"
            yield name, tensor

    def _mark_replicated_parameters(self) -> None:
        """Sets the marks by which Megatron adds up gradients and counts each parameter once in the gradient norm."""
        first_copy = self.groups.pp.rank() == 0 and not self.vp_stage
        for name, parameter in self.named_parameters():
            # The uncertainty head sees the same numbers on every rank; all else sees this rank's tokens only.
            if tensor_parallel_axis(name) is None and not name.startswith("logvar_head."):
                parameter.sequence_parallel = self.config.sequence_parallel
            if name.startswith(_ON_EVERY_STAGE):
                parameter.pipeline_parallel = True
                parameter.shared = not first_copy
                # The distributed optimizer cuts its buckets over the data-parallel ranks before the stages add up their
                # gradients: only in a bucket of its own, which this mark asks for, is a copy cut alike on every stage.
                parameter.shared_embedding = self.groups.pp.size() > 1

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describes the weights for Megatron's distributed checkpoints; layers are numbered over all stages."""
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            if name != "blocks":
                part = sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
                if f"{name}." in _ON_EVERY_STAGE:
                    self._number_copies(part)
                sharded.update(part)
        for index, block in enumerate(self.blocks):
            local = f"{prefix}blocks.{index}."
            part = sharded_state_dict_default(block, local, sharded_offsets, metadata)
            replace_prefix_for_sharding(part, local, f"{prefix}blocks.{self.layer_offset + index}.")
            sharded.update(part)
        return sharded

    def _number_copies(self, part: ShardedStateDict) -> None:
        """Tells the copies on the pipeline stages apart, so that the first alone is written."""
        copy_number = (self.vp_stage or 0) * self.groups.pp.size() + self.groups.pp.rank()
        for entry in part.values():
            entry.replica_id = (copy_number, *entry.replica_id[1:])


def _frame_steps(fps: Fps, base_fps: float) -> tuple[float, ...]:
    """Temporal rotary index per frame, one number where all samples agree."""
    if fps is None:
        return (1.0,)
    values = fps.flatten().tolist() if isinstance(fps, torch.Tensor) else [float(fps)]
    if min(values) <= 0:
        raise user_error("fps", values, "positive numbers", "Give the video's frames per second, or None for images.")
    steps = tuple(base_fps / value for value in values)
    return steps[:1] if len(set(steps)) == 1 else steps


def _frames_of(shard: TokenShard, per_frame: int) -> slice:
    """Latent frames that a piece of a clip touches."""
    return slice(shard.start // per_frame, (shard.stop - 1) // per_frame + 1)


def _uneven_frames(shard: TokenShard, per_frame: int, frames: slice, device: torch.device) -> torch.Tensor | None:
    """Tokens of this rank in each frame it touches; None where it holds whole frames."""
    if shard.start % per_frame == 0 and shard.stop % per_frame == 0:
        return None
    edges = [min(max(frame * per_frame, shard.start), shard.stop) for frame in range(frames.start, frames.stop + 1)]
    return torch.tensor([stop - start for start, stop in zip(edges, edges[1:], strict=False)], device=device)
