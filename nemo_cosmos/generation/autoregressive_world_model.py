"""An autoregressive WFM with its tokenizer and text encoder, ready to generate video.

A chunk of a long video is a window of its own: its given frames are encoded anew, as the first latent frame of every
window is that of a single picture, and places count from the window's start, as the network was trained.

Letters: B = videos, C = channels of a text token, L = text tokens, T H W = latent frames, rows, columns, S = tokens of
the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_cosmos.autoregressive.config import check_layout
from nemo_cosmos.autoregressive.decode import UNKNOWN, Drafter, write_tokens
from nemo_cosmos.autoregressive.objective import token_sequences
from nemo_cosmos.autoregressive.speculation import JacobiDrafter, MedusaDrafter, PreviousFrameDrafter
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.chunks import Chunk
from nemo_cosmos.generation.diffusion_decoder import DecodingConfig, DiffusionDecoder
from nemo_cosmos.generation.sampling import SamplingConfig, Speculation
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.generation.world_model import ChunkMaker, VideoRequest, WorldModel
from nemo_cosmos.transformer.actions import scaled_actions
from nemo_cosmos.video_io import to_pixels

if TYPE_CHECKING:
    from nemo_cosmos.autoregressive.config import ARConfig
    from nemo_cosmos.autoregressive.model import CosmosAR
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
    from nemo_cosmos.transformer.positions import Grid

_NUM_GUESSES = 15
"""Tokens that are guessed by the frame before; a pass over 16 takes about twice as long as one over a single token."""


@dataclass(kw_only=True)
class AutoregressiveWorldModel(WorldModel):
    """Writes the tokens of a chunk one after the other."""

    config: ARConfig
    """The network's, with its parallel layout."""
    network: Stage[CosmosAR]
    diffusion_decoder: DiffusionDecoder | None = None
    """Makes frames of tokens; None leaves that to the tokenizer."""

    def __post_init__(self) -> None:
        """Refuses a tokenizer or a layout that the network cannot work with.

        Raises:
            UserError: The tokenizer is not the one the network or the diffusion decoder was trained with, or has other
                codes; or the ranks cannot share the network.
        """
        super().__post_init__()
        if self._tokenizer_config.vocab_size != self.config.vocab_size:
            raise user_error(
                "codes of the tokenizer",
                self._tokenizer_config.vocab_size,
                f"{self.config.vocab_size}, the vocab_size of {self.card.model}",
                "Give the discrete tokenizer that it was trained with (--tokenizer).",
            )
        check_layout(self.config, self.config.tensor_model_parallel_size, 1, 1)
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.check_tokens_of(self.tokenizer.use(lambda tokenizer: tokenizer.fingerprint()))

    @property
    def takes_frames(self) -> bool:
        """Always: they are the first tokens."""
        return True

    @property
    def takes_actions(self) -> bool:
        """Whether there are action layers."""
        return self.config.action_dim is not None

    def tokenize(self, videos: list[np.ndarray]) -> torch.Tensor:
        """Returns the tokens of videos, int64 [B, T, H, W].

        Args:
            videos: uint8 [1 + k * temporal compression, height, width, 3] each, all alike, of whole tokens.
        """
        return self._encode(videos).long()

    def token_bits(
        self, tokens_BTHW: torch.Tensor, prompts: list[str], actions: np.ndarray | None = None
    ) -> np.ndarray:
        """Measures how well the network foresees tokens, of which the first latent frame is given.

        Args:
            tokens_BTHW: As `tokenize` gives them.
            prompts: B texts; empty ones mean no text.
            actions: float [B, frames - 1, ACTION_DIM], where the network takes actions.

        Returns:
            float64 [B, T - 1, H, W]; minus the logarithm to base 2 of each predicted token's probability.

        Raises:
            UserError: There are no predicted tokens, or the network does not take them.
        """
        self._check_texts(prompts)
        made = token_sequences(tokens_BTHW.cpu(), self.config, num_condition_latents_t=1)
        batch_size, num_frames, *rest = tokens_BTHW.shape
        text_BLC = self._text_of(prompts)

        def measure(network: CosmosAR) -> np.ndarray:
            device = next(network.parameters()).device
            terms = network(
                made.tokens_BS.to(device),
                tuple(tokens_BTHW.shape[1:]),
                None if text_BLC is None else text_BLC.to(device),
                labels_BS=made.labels_BS.to(device),
                actions_BFA=None if actions is None else _scaled(actions).to(device),
            )
            nats = (terms.log_z - terms.logit).double().cpu()[made.counted_BS]
            return (nats / math.log(2)).view(batch_size, num_frames - 1, *rest).numpy()

        return self.network.use(measure)

    @property
    def _pixels_per_token(self) -> int:
        return self._tokenizer_config.spatial_compression

    def _check_card(self) -> None:
        if self.card.tokenizer_fingerprint is None:
            raise UserError(
                f"checkpoint {self.card.model}: its card lacks the tokenizer. Convert it again with --tokenizer."
            )

    def _complete(self, config: SamplingConfig) -> SamplingConfig:
        return config.for_autoregressive(self.config)

    def _check_request(self, request: VideoRequest) -> None:
        if request.negative_prompt:
            expected = "none, for an autoregressive WFM has no guidance"
            raise user_error("negative_prompt", request.negative_prompt, expected, "Leave it out.")
        if request.first_frames is None and not self.config.special_tokens:
            expected = f"1 or more, for {self.card.model} has no token to begin a video with"
            raise user_error("first frames", None, expected, "Give a picture or a video (--first-frame).")

    def _begin(self, request: VideoRequest) -> ChunkMaker:
        text_BLC = self._text_of(request.prompts)

        def make(chunk: Chunk, first_frames: list[np.ndarray] | None) -> list[np.ndarray]:
            return self._decode(self._write(request, text_BLC, chunk, first_frames), request)

        return make

    def _write(
        self,
        request: VideoRequest,
        text_BLC: torch.Tensor | None,
        chunk: Chunk,
        first_frames: list[np.ndarray] | None,
    ) -> torch.Tensor:
        """The tokens of a chunk, int64 B T H W."""
        grid, batch_size = self._grid(chunk, request.canvas), len(request.prompts)
        tokens_BS = torch.full((batch_size, self.config.num_first + math.prod(grid)), UNKNOWN)
        if self.config.special_tokens:
            tokens_BS[:, 0] = self.config.begin_of_video
        if first_frames is not None:
            given = self.tokenize(first_frames).flatten(1)
            tokens_BS[:, self.config.num_first :][:, : given.shape[1]] = given
        actions = None if request.actions is None else _scaled(request.actions[:, chunk.actions])

        def write(network: CosmosAR) -> torch.Tensor:
            device = next(network.parameters()).device
            written = write_tokens(
                network,
                tokens_BS.to(device),
                grid,
                None if text_BLC is None else text_BLC.to(device),
                sampling=request.config.token_sampling(),
                seeds=request.seeds,
                actions_BFA=None if actions is None else actions.to(device),
                drafter=_drafter(network, grid, request.config.speculation),
                compile=request.config.compile,
                first_place=chunk.start // self._tokenizer_config.temporal_compression * math.prod(grid[1:]),
                progress=request.progress,
            )
            return written.tokens_BS[:, self.config.num_first :].reshape(batch_size, *grid)

        return self.network.use(write)

    def _decode(self, tokens_BTHW: torch.Tensor, request: VideoRequest) -> list[np.ndarray]:
        """The one place where tokens become frames, uint8 [frames, H, W, 3] of each video."""
        if self.diffusion_decoder is not None:
            videos = self.diffusion_decoder.decode(
                tokens_BTHW,
                DecodingConfig(fps=request.config.fps),
                prompts=request.prompts if any(request.prompts) else None,
                seeds=request.seeds,
                progress=request.progress,
            )
            return [to_pixels(video) for video in videos]

        def decode(tokenizer: CausalVideoTokenizer) -> list[np.ndarray]:
            tokens = tokens_BTHW.to(next(tokenizer.parameters()).device)
            return [to_pixels(video) for video in tokenizer.decode(tokens)]

        return self.tokenizer.use(decode)

    def _text_of(self, prompts: list[str]) -> torch.Tensor | None:
        return None if self.text_encoder is None else self._text(prompts)[0]


def _scaled(actions: np.ndarray) -> torch.Tensor:
    return scaled_actions(torch.as_tensor(actions, dtype=torch.float32))


def _drafter(network: CosmosAR, grid: Grid, speculation: Speculation | None) -> Drafter | None:
    if speculation == "medusa":
        return JacobiDrafter(MedusaDrafter(network))
    if speculation == "previous_frame":
        return JacobiDrafter(PreviousFrameDrafter(grid, num_guesses=min(_NUM_GUESSES, math.prod(grid[1:]))))
    return None
