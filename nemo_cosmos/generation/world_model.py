"""What generates video: a WFM of either family, with its tokenizer and text encoder.

Letters: B = videos, L = text tokens, D = width of a text token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_cosmos.contracts import ACTION_DIM, CheckpointCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.canvas import Canvas
from nemo_cosmos.generation.chunks import Chunk, plan_chunks
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.parallel.first_rank import on_first_rank
from nemo_cosmos.video_io import resize_frames, to_model

if TYPE_CHECKING:
    from nemo_cosmos.text import CachedTextEncoder
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer

ChunkMaker = Callable[[Chunk, list[np.ndarray] | None], list[np.ndarray]]
"""Generates a chunk of every video: uint8 [frames of the chunk, H, W, 3] on the canvas, from frames it begins with."""


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """A batch of videos that the model can generate."""

    prompts: list[str]
    """B texts; empty ones mean no text."""
    negative_prompt: str
    config: SamplingConfig
    """Complete."""
    canvas: Canvas
    chunks: list[Chunk]
    first_frames: list[np.ndarray] | None
    """Per video uint8 [F, H, W, 3] on the canvas, F the same for all."""
    actions: np.ndarray | None
    """[B, frames - 1, ACTION_DIM]."""
    seeds: list[int]
    """One per video."""
    progress: bool


@dataclass(kw_only=True)
class WorldModel(ABC):
    """The parts that generation needs, all in evaluation mode."""

    tokenizer: Stage[CausalVideoTokenizer]
    text_encoder: Stage[CachedTextEncoder] | None
    """None where the network takes no text."""
    card: CheckpointCard
    """Of the network; names the tokenizer it was trained with."""

    def __post_init__(self) -> None:
        """Refuses a tokenizer that the network was not trained with.

        Raises:
            UserError: The fingerprints differ, or the card lacks what generation needs.
        """
        self._check_card()
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
            UserError: A size, a frame count or a condition does not fit the network, or the seeds not the prompts.
        """
        request = self._request(
            prompts,
            config,
            first_frames=first_frames,
            actions=actions,
            negative_prompt=negative_prompt,
            seeds=seeds,
            progress=progress,
        )
        overlap, make = request.config.overlap_frames, self._begin(request)
        videos = make(request.chunks[0], request.first_frames)
        for chunk in request.chunks[1:]:
            frames = make(chunk, [video[-overlap:] for video in videos])
            videos = [np.concatenate([video, new[overlap:]]) for video, new in zip(videos, frames, strict=True)]
        return [request.canvas.crop(video) for video in videos]

    @property
    @abstractmethod
    def takes_frames(self) -> bool:
        """Whether the network goes on from given frames."""

    @property
    @abstractmethod
    def takes_actions(self) -> bool:
        """Whether the network takes actions, and then needs them."""

    @property
    @abstractmethod
    def _pixels_per_token(self) -> int:
        """Along each side of a picture."""

    @abstractmethod
    def _check_card(self) -> None:
        """Refuses a card without what generation needs."""

    @abstractmethod
    def _complete(self, config: SamplingConfig) -> SamplingConfig:
        """Fills what is not set with the model's own values, and refuses what it does not take."""

    @abstractmethod
    def _check_request(self, request: VideoRequest) -> None:
        """Refuses what this family has no room for; nothing is encoded yet."""

    @abstractmethod
    def _begin(self, request: VideoRequest) -> ChunkMaker:
        """Encodes the texts; chunks are then made in their order."""

    def _request(
        self,
        prompts: list[str],
        config: SamplingConfig | None,
        *,
        first_frames: list[np.ndarray] | None,
        actions: np.ndarray | None,
        negative_prompt: str,
        seeds: list[int] | None,
        progress: bool,
    ) -> VideoRequest:
        config = self._complete(config or SamplingConfig())
        canvas = Canvas.covering(config.height, config.width, token=self._pixels_per_token)
        chunks = plan_chunks(
            config.num_frames,
            chunk_frames=config.chunk_frames,
            overlap_frames=config.overlap_frames,
            temporal_compression=self._tokenizer_config.temporal_compression,
        )
        seeds = [config.seed + i for i in range(len(prompts))] if seeds is None else seeds
        if not prompts or len(seeds) != len(prompts):
            got = (len(prompts), len(seeds))
            raise user_error("prompts, seeds", got, "one or more, and as many", "Give a seed for each prompt, or none.")
        self._check_texts(prompts)
        self._check_first_frames(first_frames, len(prompts), config, chunks)
        self._check_actions(actions, len(prompts), config)
        request = VideoRequest(
            prompts=prompts,
            negative_prompt=negative_prompt,
            config=config,
            canvas=canvas,
            chunks=chunks,
            first_frames=_on_canvas(first_frames, canvas),
            actions=actions,
            seeds=seeds,
            progress=progress,
        )
        self._check_request(request)
        return request

    def _check_texts(self, prompts: list[str]) -> None:
        if self.text_encoder is None and any(prompts):
            expected = f"none, for {self.card.model} takes no text"
            raise user_error("prompt", max(prompts, key=len), expected, "Leave it out.")

    def _check_first_frames(
        self, first_frames: list[np.ndarray] | None, batch_size: int, config: SamplingConfig, chunks: list[Chunk]
    ) -> None:
        expected = f"none, for {self.card.model} has no condition-mask channel"
        if len(chunks) > 1 and not self.takes_frames:
            raise user_error("chunk_frames", config.chunk_frames, expected, "Use a Video2World model, or one chunk.")
        if first_frames is None:
            return
        if not self.takes_frames:
            raise user_error("first frames", len(first_frames), expected, "Leave them out, or use a Video2World model.")
        if len(first_frames) != batch_size:
            raise user_error("first frames", len(first_frames), f"one entry per prompt ({batch_size})", "Give as many.")
        counts, step = [len(frames) for frames in first_frames], self._tokenizer_config.temporal_compression
        limit = chunks[0].num_frames
        if len(set(counts)) > 1 or counts[0] >= limit or counts[0] < 1 or (counts[0] - 1) % step:
            expected = f"the same count for all videos, 1 + k * {step} and below {limit}"
            raise user_error("first frames", counts, expected, "Take another number of them, such as 1.")

    def _check_actions(self, actions: np.ndarray | None, batch_size: int, config: SamplingConfig) -> None:
        if self.takes_actions != (actions is not None):
            wanted = "actions" if self.takes_actions else "no actions"
            raise user_error("actions", actions is not None, f"{wanted} for {self.card.model}", "See its card.")
        if actions is None:
            return
        shape = (batch_size, config.num_frames - 1, ACTION_DIM)
        if actions.shape != shape:
            fix = "Give one row of seven numbers per frame after the first."
            raise user_error("actions", actions.shape, str(list(shape)), fix)

    def _encode(self, first_frames: list[np.ndarray]) -> torch.Tensor:
        """Latent of the frames that a chunk begins with; [B, C, T, H, W], or of a discrete tokenizer [B, T, H, W]."""

        def encode(tokenizer: CausalVideoTokenizer) -> torch.Tensor:
            pixels = torch.stack([to_model(frames) for frames in first_frames])
            return tokenizer.encode(pixels.to(next(tokenizer.parameters()).device))

        return self.tokenizer.use(encode)

    def _text(self, *groups: list[str]) -> list[torch.Tensor]:
        """Token states of each group of prompts, B L D on the CPU; the network must take text."""
        assert self.text_encoder is not None

        def encode(encoder: CachedTextEncoder) -> list[torch.Tensor]:
            return [encoder.encode(prompts)[0] for prompts in groups]

        # One rank has the encoder in memory and hands out its states: it may be larger than the network.
        return on_first_rank(lambda: self.text_encoder.use(encode))

    def _grid(self, chunk: Chunk, canvas: Canvas) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        config = self._tokenizer_config
        frames = 1 + (chunk.num_frames - 1) // config.temporal_compression
        side = config.spatial_compression
        return frames, canvas.padded_height // side, canvas.padded_width // side


def _on_canvas(frames: list[np.ndarray] | None, canvas: Canvas) -> list[np.ndarray] | None:
    return None if frames is None else [canvas.pad(resize_frames(f, canvas.height, canvas.width)) for f in frames]
