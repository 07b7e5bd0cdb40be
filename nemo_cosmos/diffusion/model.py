"""The Cosmos diffusion transformer as a Megatron-core model.

Letters: B = batch, C = channels, T H W = latent frames, rows, columns, S = tokens of the whole sequence, s = tokens of
this rank, D = hidden size, L = text tokens, F = groups of tokens that share their modulation, P = values of a patch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

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

from nemo_cosmos.diffusion.adaln import AdaLNLoRA, modulate
from nemo_cosmos.diffusion.config import DiTConfig, check_layout
from nemo_cosmos.diffusion.embeddings import ConditionEmbedder, PatchEmbed, UncertaintyHead, linear, unpatchify
from nemo_cosmos.diffusion.initialization import initialize_weights, tensor_parallel_axis
from nemo_cosmos.diffusion.layer_spec import BlockInputs, DiTBlock, dit_block_spec
from nemo_cosmos.diffusion.packing import Pack, check_pack, check_packed_layout
from nemo_cosmos.diffusion.positions import LearnablePositions, learned_positions, sincos_positions
from nemo_cosmos.diffusion.rope import rope_tables
from nemo_cosmos.diffusion.stage_input import Conditioning, pack, unpack
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.backend import get_backend
from nemo_cosmos.parallel.device import on_device
from nemo_cosmos.parallel.fsdp import describe_shard, is_sharded
from nemo_cosmos.parallel.tokens import (
    TokenShard,
    count_once,
    gather_tokens,
    join_samples,
    share_samples,
    split_tokens,
    token_shard,
    without_context,
)
from nemo_cosmos.transformer.positions import Grid
from nemo_cosmos.transformer.recompute import run_blocks

Fps = float | torch.Tensor | None


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

    Time, actions and learned positions are embedded on the first stage and cross to the others behind the hidden states
    (see `stage_input.py`). Context-parallel ranks share the tokens of a video, and of images the samples. Needs
    Megatron's process groups, also on one rank.

    Args:
        config: Sizes and layout.
        pre_process: Whether this stage embeds the latent.
        post_process: Whether this stage gives the prediction.
        vp_stage: Virtual stage, where the pipeline is interleaved.
        pg_collection: Process groups; Megatron's own where None.

    Raises:
        UserError: The layout cannot hold this model; raised before any weight is allocated.
    """

    fsdp_units = (DiTBlock, UncertaintyHead)
    """What `parallel.fsdp` gathers as one: the head too, since it runs apart from the rest."""

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
        self._mark_sequence_parallel()

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
            B C T H W, or a list of 1 C T H W for a pack, on the last pipeline stage; on others what the next one takes
            (see `stage_input.py`).

        Raises:
            UserError: A size does not fit the model or the layout.
        """
        inputs = (x_BCTHW, timesteps_B, crossattn_emb_BLD, fps, padding_mask_B1HW, condition_mask_B1THW, actions_BTA)
        if isinstance(x_BCTHW, list):
            self._check_pack(*inputs)
            return self._forward(self.groups, *inputs)
        return self._forward_batch(*inputs)

    def _forward_batch(self, x_BCTHW: torch.Tensor, *conditions: Any) -> torch.Tensor:  # noqa: ANN401 - those of _forward
        """Of images, context-parallel ranks share the samples; of all else, the tokens."""
        cp, num_samples = self.groups.cp, len(x_BCTHW)
        if cp.size() == 1 or x_BCTHW.shape[2] > 1:
            return self._forward(self.groups, x_BCTHW, *conditions)
        own = (share_samples(x, num_samples, cp) for x in (x_BCTHW, *conditions))
        output = self._forward(without_context(self.groups), *own)
        return join_samples(output, num_samples, cp) if self.post_process else output

    def _forward(
        self,
        groups: ProcessGroupCollection,
        x_BCTHW: torch.Tensor | list[torch.Tensor],
        timesteps_B: torch.Tensor,
        text_BLD: torch.Tensor,
        fps: Fps,
        padding_mask_B1HW: torch.Tensor | None,
        condition_mask_B1THW: torch.Tensor | list[torch.Tensor] | None,
        actions_BTA: torch.Tensor | None,
    ) -> torch.Tensor | list[torch.Tensor]:
        is_packed = isinstance(x_BCTHW, list)
        clips = x_BCTHW if isinstance(x_BCTHW, list) else [x_BCTHW]
        clips_at = Pack(grids=tuple(self.config.token_grid(tuple(clip.shape[2:])) for clip in clips))
        sequence_parallel = self.config.sequence_parallel
        shard = token_shard(sum(clips_at.lengths), groups, sequence_parallel=sequence_parallel)
        pieces = clips_at.pieces(shard)
        if self.pre_process:
            patches_SBP = self._patches(clips, condition_mask_B1THW, padding_mask_B1HW)
            hidden = self.x_embedder(split_tokens(patches_SBP, groups, sequence_parallel=sequence_parallel))
            conditioning = self._condition(timesteps_B, actions_BTA, clips, clips_at, pieces, is_packed)
        else:
            frames = _frames_of(pieces[0][1], clips_at.grids[0])
            num_groups = len(pieces) if is_packed else 1 if actions_BTA is None else frames.stop - frames.start
            hidden, conditioning = unpack(self.input_tensor, len(shard), num_groups)
        inputs = self._block_inputs(conditioning, text_BLD, groups, clips_at, shard, fps, is_packed)
        hidden = run_blocks(list(self.blocks), hidden, inputs, config=self.config)
        if not self.post_process:
            return make_viewless_tensor(pack(hidden, conditioning), requires_grad=True, keep_graph=True)
        patches_SBP = gather_tokens(self.final_layer(hidden, inputs), groups, sequence_parallel=sequence_parallel)
        predicted = [
            unpatchify(patches, grid, self.config.patch_size)
            for patches, grid in zip(patches_SBP.split(clips_at.lengths), clips_at.grids, strict=True)
        ]
        return predicted if is_packed else predicted[0]

    def logvar(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        """Predicted log-variance of the loss at each sample's c_noise; float32 [B], on the last stage only."""
        return count_once(self.logvar_head(timesteps_B), self.groups.cp)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Takes the hidden states that the previous pipeline stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _patches(
        self,
        clips: list[torch.Tensor],
        condition_mask_B1THW: torch.Tensor | list[torch.Tensor] | None,
        padding_mask_B1HW: torch.Tensor | None,
    ) -> torch.Tensor:
        masks = condition_mask_B1THW if isinstance(condition_mask_B1THW, list) else [condition_mask_B1THW] * len(clips)
        patches = [
            self.x_embedder.tokens(clip, mask, padding_mask_B1HW) for clip, mask in zip(clips, masks, strict=True)
        ]
        return torch.cat(patches) if len(patches) > 1 else patches[0]

    def _condition(
        self,
        timesteps_B: torch.Tensor,
        actions_BTA: torch.Tensor | None,
        clips: list[torch.Tensor],
        clips_at: Pack,
        pieces: list[tuple[int, TokenShard]],
        is_packed: bool,
    ) -> Conditioning:
        self.conditioning.check_actions(actions_BTA, len(clips[0]), clips[0].shape[2])
        spans = [(clips_at.grids[index], _frames_of(piece, clips_at.grids[index])) for index, piece in pieces]
        if is_packed:  # each clip is a group of tokens with a modulation of its own
            present = slice(pieces[0][0], pieces[-1][0] + 1)
            emb_FBD, shared_FBC = (
                x_1BD.transpose(0, 1) for x_1BD in self.conditioning(timesteps_B[present], None, slice(0))
            )
        else:
            emb_FBD, shared_FBC = self.conditioning(timesteps_B, actions_BTA, spans[0][1])
        rows = None
        if self.config.extra_pos_embed == "learnable":
            rows = torch.cat([self.extra_pos_embedder(grid, frames) for grid, frames in spans])
        return Conditioning(emb_FBD=emb_FBD, shared_FBC=shared_FBC, position_rows_RD=rows)

    def _block_inputs(
        self,
        conditioning: Conditioning,
        text_BLD: torch.Tensor,
        groups: ProcessGroupCollection,
        clips_at: Pack,
        shard: TokenShard,
        fps: Fps,
        is_packed: bool,
    ) -> BlockInputs:
        config = self.config
        if text_BLD.ndim != 3 or text_BLD.shape[-1] != config.crossattn_emb_channels:
            expected = f"[batch, tokens, {config.crossattn_emb_channels}]"
            raise user_error(
                "crossattn_emb_BLD", tuple(text_BLD.shape), expected, "Use the encoder it was trained with."
            )
        emb_FBD, device = conditioning.emb_FBD, text_BLD.device
        pieces = clips_at.pieces(shard)
        counts, limits = None, (None, None)
        if is_packed:
            counts = on_device([len(piece) for _, piece in pieces], device, torch.int64)
            attended = token_shard(shard.total, groups, sequence_parallel=False)
            limits = clips_at.attention_limits(attended, text_BLD.shape[1], device)
        elif len(emb_FBD) > 1:
            counts = _uneven_frames(shard, clips_at.grids[0], _frames_of(shard, clips_at.grids[0]), device)
        layout = "B L C -> (B L) 1 C" if is_packed else "B L C -> L B C"
        return BlockInputs(
            emb_FBD=emb_FBD,
            shared_FBC=conditioning.shared_FBC,
            num_tokens=len(shard),
            tokens_per_frame=counts,
            text_LBC=rearrange(text_BLD, layout).to(emb_FBD.dtype).contiguous(),
            rope=self._rope(groups, clips_at, fps, is_packed, device),
            positions_s1D=self._positions(conditioning, clips_at, pieces),
            tokens_shared=groups.cp.size() > 1,
            limits=limits,
        )

    def _positions(
        self, conditioning: Conditioning, clips_at: Pack, pieces: list[tuple[int, TokenShard]]
    ) -> torch.Tensor | None:
        config, parts = self.config, []
        if conditioning.position_rows_RD is not None:
            spans = [(clips_at.grids[index], piece) for index, piece in pieces]
            frames = [_frames_of(piece, grid) for grid, piece in spans]
            sizes = [f.stop - f.start + grid[1] + grid[2] for f, (grid, _) in zip(frames, spans, strict=True)]
            for rows, f, (grid, piece) in zip(conditioning.position_rows_RD.split(sizes), frames, spans, strict=True):
                parts.append(learned_positions(rows, grid, piece, f))
        elif config.extra_pos_embed == "sincos":
            emb = conditioning.emb_FBD
            for index, piece in pieces:
                place = (piece.start, piece.stop)
                parts.append(sincos_positions(clips_at.grids[index], config.hidden_size, place, emb.dtype, emb.device))
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def _rope(
        self, groups: ProcessGroupCollection, clips_at: Pack, fps: Fps, is_packed: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        # Linear layers gather what sequence parallelism splits: attention sees the whole context-parallel piece.
        attended = token_shard(sum(clips_at.lengths), groups, sequence_parallel=False)
        rates = fps.tolist() if is_packed and isinstance(fps, torch.Tensor) else [fps] * len(clips_at.grids)
        tables = [
            rope_tables(
                clips_at.grids[index],
                config.kv_channels,
                config.rope_ratio,
                _frame_steps(rates[index], config.base_fps),
                (piece.start, piece.stop),
                device,
            )
            for index, piece in clips_at.pieces(attended)
        ]
        if len(tables) == 1:
            return tables[0]
        cosines, sines = zip(*tables, strict=True)
        return torch.cat(cosines), torch.cat(sines)

    def _check_pack(
        self,
        clips: list[torch.Tensor],
        timesteps_B: torch.Tensor,
        text_BLD: torch.Tensor,
        fps: Fps,
        padding_mask: torch.Tensor | None,
        masks: torch.Tensor | list[torch.Tensor] | None,
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
                "condition_mask_B1THW": None if masks is None else len(masks),
            },
        )
        check_packed_layout(self.config)

    def global_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers under the names they have on one rank."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                name = f"blocks.{self.layer_offset + int(index)}.{rest}"
            yield name, tensor

    def _mark_sequence_parallel(self) -> None:
        """Marks the parameters whose gradients Megatron adds up over the ranks that split the tokens."""
        for name, parameter in self.named_parameters():
            # The uncertainty head sees the same numbers on every rank; all else sees this rank's tokens only.
            if tensor_parallel_axis(name) is None and not name.startswith("logvar_head."):
                parameter.sequence_parallel = self.config.sequence_parallel

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describes the weights for Megatron's distributed checkpoints; layers are numbered over all stages."""
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            if name != "blocks":
                sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        for index, block in enumerate(self.blocks):
            local = f"{prefix}blocks.{index}."
            part = sharded_state_dict_default(block, local, sharded_offsets, metadata)
            replace_prefix_for_sharding(part, local, f"{prefix}blocks.{self.layer_offset + index}.")
            sharded.update(part)
        for (name, parameter), (global_name, _) in zip(self.named_parameters(), self.global_tensors(), strict=False):
            if is_sharded(parameter):
                axis = tensor_parallel_axis(name)
                sharded[prefix + name] = describe_shard(prefix + global_name, parameter, axis, self.groups)
        return sharded


def _frame_steps(fps: Fps, base_fps: float) -> tuple[float, ...]:
    """Temporal rotary index per frame, one number where all samples agree."""
    if fps is None:
        return (1.0,)
    values = fps.flatten().tolist() if isinstance(fps, torch.Tensor) else [float(fps)]
    if min(values) <= 0:
        raise user_error("fps", values, "positive numbers", "Give the video's frames per second, or None for images.")
    steps = tuple(base_fps / value for value in values)
    return steps[:1] if len(set(steps)) == 1 else steps


def _frames_of(shard: TokenShard, grid: Grid) -> slice:
    """Latent frames that this rank's tokens belong to."""
    per_frame = grid[1] * grid[2]
    return slice(shard.start // per_frame, (shard.stop - 1) // per_frame + 1)


def _uneven_frames(shard: TokenShard, grid: Grid, frames: slice, device: torch.device) -> torch.Tensor | None:
    """Tokens of this rank in each frame it touches; None where it holds whole frames."""
    per_frame = grid[1] * grid[2]
    if shard.start % per_frame == 0 and shard.stop % per_frame == 0:
        return None
    edges = [min(max(frame * per_frame, shard.start), shard.stop) for frame in range(frames.start, frames.stop + 1)]
    return on_device([stop - start for start, stop in itertools.pairwise(edges)], device, torch.int64)
