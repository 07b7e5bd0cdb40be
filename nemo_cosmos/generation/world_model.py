"""A diffusion WFM with its tokenizer and text encoder, ready to generate video.

Letters: B = videos, C = channels, T H W = latent frames, rows, columns, L = text tokens, D = width of a text token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import denormalise_latent, normalise_latent
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.config import check_layout
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.canvas import Canvas
from nemo_cosmos.generation.chunks import Chunk, plan_chunks
from nemo_cosmos.generation.denoiser import VideoDenoiser
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.generation.staged import StagedNetwork
from nemo_cosmos.parallel.branches import BranchRanks
from nemo_cosmos.parallel.first_rank import on_first_rank
from nemo_cosmos.tokenizer.statistics import LatentStatistics, Numbers, check_statistics
from nemo_cosmos.video_io import resize_frames, to_model, to_pixels

if TYPE_CHECKING:
    from nemo_cosmos.diffusion.config import DiTConfig
    from nemo_cosmos.diffusion.model import CosmosDiT
    from nemo_cosmos.text import CachedTextEncoder
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer


_SAME_RATE = 0.01
"""Share by which two rates differ that are meant to be one, such as 24 and 23.976."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What all chunks of a batch of videos have in common."""

    config: SamplingConfig
    """Complete."""
    canvas: Canvas
    chunks: list[Chunk]
    text_BLD: torch.Tensor
    negative_BLD: torch.Tensor
    actions: np.ndarray | None
    """[B, frames - 1, ACTION_DIM]."""
    sigmas: torch.Tensor
    """Noise levels of a run."""
    generators: list[torch.Generator]
    """One per video; each chunk draws its noise where the one before it stopped."""
    progress: bool


@dataclass(kw_only=True)
class WorldModel:
    """The parts that generation needs, all in evaluation mode."""

    config: DiTConfig
    """The network's, with its parallel layout."""
    network: Stage[CosmosDiT]
    tokenizer: Stage[CausalVideoTokenizer]
    text_encoder: Stage[CachedTextEncoder]
    card: CheckpointCard
    """Of the network: its latent statistics and the tokenizer it was trained with."""
    edm: EDM
    levels: dict[str, Any] = field(default_factory=dict)
    """Noise levels that the checkpoint names, as fields of `SamplingConfig`."""
    branch_ranks: BranchRanks | None = None
    """Ranks that compute one branch of guidance each; None computes both on every rank."""

    def __post_init__(self) -> None:
        """Refuses a tokenizer that the network was not trained with.

        Raises:
            UserError: The fingerprints differ, or the card lacks the latent statistics.
        """
        if self.card.tokenizer_fingerprint is None or self.card.latent_mean is None or self.card.latent_std is None:
            raise UserError(
                f"checkpoint {self.card.model}: its card lacks the tokenizer or the latent statistics. Give a "
                "diffusion WFM's, or convert it again with --tokenizer and --statistics."
            )
        self._tokenizer_config, ours = self.tokenizer.use(lambda part: (part.tokenizer_config, part.fingerprint()))
        if self.card.tokenizer_fingerprint != ours:
            raise UserError(
                f"checkpoint {self.card.model}: was trained on latents of tokenizer {self.card.tokenizer_fingerprint}, "
                f"but the tokenizer given is {ours}. Give the one it was trained with."
            )

    def generate(
        self,
        prompts: list[str],
        config: SamplingConfig | None = None,
        *,
        first_frames: list[np.ndarray] | None = None,
        actions: np.ndarray | None = None,
        negative_prompt: str = "",
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Generates a batch of videos; all ranks of a layout call it with the same arguments.

        A video longer than a chunk goes on from the last frames of what is there, encoded anew.

        Args:
            prompts: B texts; empty ones mean no text.
            config: Sizes and sampling; what it leaves out takes the model's own value.
            first_frames: Per video the frames to go on from, uint8 [F, H, W, 3] with F = 1 + k * temporal compression;
                absent for Text2World.
            actions: float [B, num_frames-1, ACTION_DIM], where the network takes actions.
            negative_prompt: What guidance moves away from.
            seeds: One per video; config.seed + i when absent.
            progress: Show a progress bar.

        Returns:
            B videos, uint8 [num_frames, height, width, 3].

        Raises:
            UserError: A size, a frame count or the actions do not fit the network, or the seeds not the prompts.
        """
        batch = self._batch(
            prompts,
            config,
            first_frames=first_frames,
            actions=actions,
            negative_prompt=negative_prompt,
            seeds=seeds,
            progress=progress,
        )
        overlap = batch.config.overlap_frames
        videos = self._decode(self._sample(batch, batch.chunks[0], self._on_canvas(first_frames, batch.canvas)))
        for chunk in batch.chunks[1:]:
            frames = self._decode(self._sample(batch, chunk, [video[-overlap:] for video in videos]))
            videos = [np.concatenate([video, new[overlap:]]) for video, new in zip(videos, frames, strict=True)]
        return [batch.canvas.crop(video) for video in videos]

    def sample(
        self,
        prompts: list[str],
        config: SamplingConfig | None = None,
        *,
        first_frames: list[np.ndarray] | None = None,
        actions: np.ndarray | None = None,
        negative_prompt: str = "",
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Samples the latents of the first chunk of a batch of videos; see `generate`.

        Returns:
            B C T H W, normalised and times `edm.sigma_data`, as diffusers' pipelines give with
            `output_type="latent"`.
        """
        batch = self._batch(
            prompts,
            config,
            first_frames=first_frames,
            actions=actions,
            negative_prompt=negative_prompt,
            seeds=seeds,
            progress=progress,
        )
        return self._sample(batch, batch.chunks[0], self._on_canvas(first_frames, batch.canvas))

    def _batch(
        self,
        prompts: list[str],
        config: SamplingConfig | None,
        *,
        first_frames: list[np.ndarray] | None,
        actions: np.ndarray | None,
        negative_prompt: str,
        seeds: list[int] | None,
        progress: bool,
    ) -> _Batch:
        config = (config or SamplingConfig()).for_model(self.config, self.levels)
        spatial = self._tokenizer_config.spatial_compression
        canvas = Canvas.covering(config.height, config.width, token=spatial * self.config.patch_spatial)
        chunks = plan_chunks(
            config.num_frames,
            chunk_frames=config.chunk_frames,
            overlap_frames=config.overlap_frames,
            temporal_compression=self._tokenizer_config.temporal_compression,
        )
        self._check_conditions(first_frames, actions, len(prompts), config, chunks)
        for chunk in chunks:
            self._check_size(self._latent_shape(1, chunk, canvas))
        sigmas = config.sigmas()
        seeds = [config.seed + i for i in range(len(prompts))] if seeds is None else seeds
        if not prompts or len(seeds) != len(prompts):
            got = (len(prompts), len(seeds))
            raise user_error("prompts, seeds", got, "one or more, and as many", "Give a seed for each prompt, or none.")
        text_BLD, negative_1LD = self._text(prompts, [negative_prompt])
        return _Batch(
            config=config,
            canvas=canvas,
            chunks=chunks,
            text_BLD=text_BLD,
            negative_BLD=negative_1LD.expand_as(text_BLD),
            actions=actions,
            sigmas=sigmas,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            progress=progress,
        )

    def _sample(self, batch: _Batch, chunk: Chunk, first_frames: list[np.ndarray] | None) -> torch.Tensor:
        shape = self._latent_shape(len(batch.text_BLD), chunk, batch.canvas)
        given, mask = self._given(first_frames, shape, chunk)
        noise, augment_noise = _noise(shape, batch.generators)
        actions = None if batch.actions is None else self._actions(batch.actions[:, chunk.actions])

        def sample(network: CosmosDiT) -> torch.Tensor:
            device = next(network.parameters()).device
            denoiser = VideoDenoiser(
                network=network if self.config.pipeline_model_parallel_size == 1 else StagedNetwork(network),
                edm=self.edm,
                text_emb=batch.text_BLD.to(device),
                negative_text_emb=batch.negative_BLD.to(device),
                fps=torch.full((shape[0],), batch.config.fps),  # on the CPU: the network reads it as plain numbers
                given=given.to(device),
                mask=mask.to(device),
                augment_noise=augment_noise.to(device),
                guidance=batch.config.guidance,
                input_frames_guidance=batch.config.input_frames_guidance,
                actions=None if actions is None else actions.to(device),
                video2world=self.config.concat_condition_mask,
                branch_ranks=self.branch_ranks,
            )
            integrate = SAMPLERS[batch.config.sampler]
            return integrate(denoiser, noise.to(device), batch.sigmas, progress=batch.progress)

        return self.network.use(sample)

    def _decode(self, latent: torch.Tensor) -> list[np.ndarray]:
        def decode(tokenizer: CausalVideoTokenizer) -> list[np.ndarray]:
            plain = denormalise_latent(latent / self.edm.sigma_data, *self._statistics(latent.shape[2]))
            return [to_pixels(video) for video in tokenizer.decode(plain)]

        return self.tokenizer.use(decode)

    def _latent_shape(self, batch_size: int, chunk: Chunk, canvas: Canvas) -> torch.Size:
        spatial = self._tokenizer_config.spatial_compression
        frames = 1 + (chunk.num_frames - 1) // self._tokenizer_config.temporal_compression
        height, width = canvas.padded_height // spatial, canvas.padded_width // spatial
        return torch.Size([batch_size, self.config.in_channels, frames, height, width])

    def _check_size(self, shape: torch.Size) -> None:
        """Refuses a latent that the network, its layout or the statistics have no room for."""
        config, frames = self.config, shape[2]
        tokens = int(np.prod(config.token_grid(tuple(shape[2:]))))
        sizes = [getattr(config, f"{axis}_parallel_size") for axis in ("tensor_model", "pipeline_model", "context")]
        check_layout(config, *sizes, tokens)
        name = f"latent statistics of {self.card.model}"
        check_statistics(name, *self._statistics(frames), num_channels=config.in_channels, num_latent_frames=frames)

    def _statistics(self, num_latent_frames: int) -> tuple[Numbers, Numbers]:
        """Those of what is generated: a frame that is given begins a video, and is no picture."""
        found = LatentStatistics.of_card(self.card).of(num_latent_frames)
        assert found is not None  # by __post_init__
        return found

    def _check_conditions(
        self,
        first_frames: list[np.ndarray] | None,
        actions: np.ndarray | None,
        batch_size: int,
        config: SamplingConfig,
        chunks: list[Chunk],
    ) -> None:
        takes_frames, takes_actions = self.config.concat_condition_mask, self.config.action_dim is not None
        expected = f"none, for {self.card.model} has no condition-mask channel"
        if first_frames is not None and not takes_frames:
            raise user_error("first frames", len(first_frames), expected, "Leave them out, or use a Video2World model.")
        if len(chunks) > 1 and not takes_frames:
            raise user_error("chunk_frames", config.chunk_frames, expected, "Use a Video2World model, or one chunk.")
        if takes_actions != (actions is not None):
            wanted = "actions" if takes_actions else "no actions"
            raise user_error("actions", actions is not None, f"{wanted} for {self.card.model}", "See its card.")
        if first_frames is not None and len(first_frames) != batch_size:
            raise user_error("first frames", len(first_frames), f"one entry per prompt ({batch_size})", "Give as many.")
        if actions is not None and (len(actions) != batch_size or actions.shape[1] != config.num_frames - 1):
            expected = f"[{batch_size}, {config.num_frames - 1}, 7]"
            raise user_error("actions", actions.shape, expected, "Give one row per frame after the first.")
        if self.branch_ranks is not None and not config.guidance:
            raise user_error("guidance", 0, "more than 0 where its branches are split", "Set it, or do not split.")

    @staticmethod
    def _on_canvas(frames: list[np.ndarray] | None, canvas: Canvas) -> list[np.ndarray] | None:
        return None if frames is None else [canvas.pad(resize_frames(f, canvas.height, canvas.width)) for f in frames]

    def _given(
        self, first_frames: list[np.ndarray] | None, shape: torch.Size, chunk: Chunk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the given frames into the first slots of a latent."""
        if first_frames is None:
            return torch.zeros(shape), condition_mask(torch.zeros(shape[0], dtype=torch.int64), shape)
        pixels = [to_model(frames) for frames in first_frames]
        if len({p.shape for p in pixels}) > 1 or pixels[0].shape[1] >= chunk.num_frames:
            got = [p.shape[1] for p in pixels]
            raise user_error("first frames", got, f"equal counts below {chunk.num_frames}", "Cut them to one length.")

        def encode(tokenizer: CausalVideoTokenizer) -> torch.Tensor:
            latent = tokenizer.encode(torch.stack(pixels).to(next(tokenizer.parameters()).device))
            return normalise_latent(latent, *self._statistics(shape[2])) * self.edm.sigma_data

        latent = self.tokenizer.use(encode)
        given = torch.zeros(shape, device=latent.device)
        given[:, :, : latent.shape[2]] = latent
        return given, condition_mask(torch.full((shape[0],), latent.shape[2]), shape)

    def _text(self, *groups: list[str]) -> list[torch.Tensor]:
        """Token states of each group of prompts, B L D on the CPU."""

        def encode(encoder: CachedTextEncoder) -> list[torch.Tensor]:
            return [encoder.encode(prompts)[0] for prompts in groups]

        # One rank has the encoder in memory and hands out its states: it may be larger than the network.
        return on_first_rank(lambda: self.text_encoder.use(encode))

    def _actions(self, actions: np.ndarray) -> torch.Tensor:
        return actions_per_latent_frame(
            torch.as_tensor(actions, dtype=torch.float32), self._tokenizer_config.temporal_compression
        )


def _noise(shape: torch.Size, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws each video's noise from its own generator, whole and on the CPU: batch, device and layout change nothing.

    Returns:
        Noise to start from and noise on given frames, both N(0, 1), B C T H W.
    """
    noise = torch.stack([torch.randn(2, *shape[1:], generator=generator) for generator in generators])
    return noise[:, 0], noise[:, 1]


def read_first_frames(path: Path, *, num_frames: int, fps: float, height: int, width: int) -> np.ndarray:
    """Reads the frames to go on from: an image, or the end of a video.

    Pictures of another shape are scaled to cover the size and cut at their edges; of a video of a higher rate, frames
    are left out.

    Args:
        path: A png, jpg or video file.
        num_frames: How many frames are wanted from a video: its last ones.
        fps: Frames per second of what is generated.
        height: Pixels.
        width: Pixels.

    Returns:
        uint8 [num_frames or 1, height, width, 3].

    Raises:
        UserError: The file cannot be read, or the video is too short or of too low a rate.
    """
    from nemo_cosmos.video_io import read_image, read_video

    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        return resize_frames(read_image(path)[None], height, width)
    frames, own_fps = read_video(path)
    step = own_fps / fps
    if num_frames > 1 and step < 1 - _SAME_RATE:
        raise user_error(
            f"frames per second of {path}",
            own_fps,
            f"at least those generated ({fps})",
            "Generate at its rate (--fps), or go on from one frame.",
        )
    step = 1.0 if abs(step - 1) < _SAME_RATE else step
    back = np.round(np.arange(num_frames)[::-1] * step).astype(int)
    if len(frames) <= back[0]:
        expected = f"at least {back[0] + 1} frames for {num_frames} at {fps} a second"
        raise user_error(str(path), f"{len(frames)} frames", expected, "Give a longer video.")
    return resize_frames(frames[len(frames) - 1 - back], height, width)
