"""A diffusion WFM with its tokenizer and text encoder, ready to generate video.

Letters: B = videos, C = channels, T H W = latent frames, rows, columns, L = text tokens, D = width of a text token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_cosmos.data.latent_cache import denormalise_latent, normalise_latent
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.config import check_layout
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.canvas import Canvas
from nemo_cosmos.generation.chunks import Chunk
from nemo_cosmos.generation.denoiser import VideoDenoiser
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.generation.staged import StagedNetwork
from nemo_cosmos.generation.world_model import ChunkMaker, VideoRequest, WorldModel
from nemo_cosmos.parallel.branches import BranchRanks
from nemo_cosmos.tokenizer.statistics import LatentStatistics, Numbers, check_statistics
from nemo_cosmos.video_io import to_pixels

if TYPE_CHECKING:
    from nemo_cosmos.diffusion.config import DiTConfig
    from nemo_cosmos.diffusion.model import CosmosDiT
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What all chunks of a batch of videos have in common."""

    request: VideoRequest
    text_BLD: torch.Tensor
    negative_BLD: torch.Tensor
    sigmas: torch.Tensor
    """Noise levels of a run."""
    generators: list[torch.Generator]
    """One per video; each chunk draws its noise where the one before it stopped."""


@dataclass(kw_only=True)
class DiffusionWorldModel(WorldModel):
    """Denoises the latents of a chunk all at once."""

    config: DiTConfig
    """The network's, with its parallel layout."""
    network: Stage[CosmosDiT]
    edm: EDM
    levels: dict[str, Any] = field(default_factory=dict)
    """Noise levels that the checkpoint names, as fields of `SamplingConfig`."""
    branch_ranks: BranchRanks | None = None
    """Ranks that compute one branch of guidance each; None computes both on every rank."""

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
        request = self._request(
            prompts,
            config,
            first_frames=first_frames,
            actions=actions,
            negative_prompt=negative_prompt,
            seeds=seeds,
            progress=progress,
        )
        return self._sample(self._batch(request), request.chunks[0], request.first_frames)

    @property
    def takes_frames(self) -> bool:
        """Whether there is a channel that tells given latents from others."""
        return self.config.concat_condition_mask

    @property
    def takes_actions(self) -> bool:
        """Whether there are action layers."""
        return self.config.action_dim is not None

    @property
    def _pixels_per_token(self) -> int:
        return self._tokenizer_config.spatial_compression * self.config.patch_spatial

    def _check_card(self) -> None:
        if self.card.tokenizer_fingerprint is None or self.card.latent_mean is None or self.card.latent_std is None:
            raise UserError(
                f"checkpoint {self.card.model}: its card lacks the tokenizer or the latent statistics. Give a "
                "diffusion WFM's, or convert it again with --tokenizer and --statistics."
            )

    def _complete(self, config: SamplingConfig) -> SamplingConfig:
        return config.for_diffusion(self.config, self.levels)

    def _check_request(self, request: VideoRequest) -> None:
        for chunk in request.chunks:
            self._check_size(self._latent_shape(1, chunk, request.canvas))
        request.config.sigmas()
        if self.branch_ranks is not None and not request.config.guidance:
            raise user_error("guidance", 0, "more than 0 where its branches are split", "Set it, or do not split.")

    def _begin(self, request: VideoRequest) -> ChunkMaker:
        batch = self._batch(request)
        return lambda chunk, first_frames: self._decode(self._sample(batch, chunk, first_frames))

    def _batch(self, request: VideoRequest) -> _Batch:
        text_BLD, negative_1LD = self._text(request.prompts, [request.negative_prompt])
        return _Batch(
            request=request,
            text_BLD=text_BLD,
            negative_BLD=negative_1LD.expand_as(text_BLD),
            sigmas=request.config.sigmas(),
            generators=[torch.Generator().manual_seed(seed) for seed in request.seeds],
        )

    def _sample(self, batch: _Batch, chunk: Chunk, first_frames: list[np.ndarray] | None) -> torch.Tensor:
        request, config = batch.request, batch.request.config
        shape = self._latent_shape(len(request.prompts), chunk, request.canvas)
        given, mask = self._given(first_frames, shape)
        noise, augment_noise = _noise(shape, batch.generators)
        actions = None if request.actions is None else self._actions(request.actions[:, chunk.actions])

        def sample(network: CosmosDiT) -> torch.Tensor:
            device = next(network.parameters()).device
            denoiser = VideoDenoiser(
                network=network if self.config.pipeline_model_parallel_size == 1 else StagedNetwork(network),
                edm=self.edm,
                text_emb=batch.text_BLD.to(device),
                negative_text_emb=batch.negative_BLD.to(device),
                fps=torch.full((shape[0],), config.fps),  # on the CPU: the network reads it as plain numbers
                given=given.to(device),
                mask=mask.to(device),
                augment_noise=augment_noise.to(device),
                guidance=config.guidance,
                input_frames_guidance=config.input_frames_guidance,
                actions=None if actions is None else actions.to(device),
                video2world=self.config.concat_condition_mask,
                branch_ranks=self.branch_ranks,
            )
            integrate = SAMPLERS[config.sampler]
            return integrate(denoiser, noise.to(device), batch.sigmas, progress=request.progress)

        return self.network.use(sample)

    def _decode(self, latent: torch.Tensor) -> list[np.ndarray]:
        def decode(tokenizer: CausalVideoTokenizer) -> list[np.ndarray]:
            plain = denormalise_latent(latent / self.edm.sigma_data, *self._statistics(latent.shape[2]))
            return [to_pixels(video) for video in tokenizer.decode(plain)]

        return self.tokenizer.use(decode)

    def _latent_shape(self, batch_size: int, chunk: Chunk, canvas: Canvas) -> torch.Size:
        return torch.Size([batch_size, self.config.in_channels, *self._grid(chunk, canvas)])

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

    def _given(self, first_frames: list[np.ndarray] | None, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the given frames into the first slots of a latent."""
        if first_frames is None:
            return torch.zeros(shape), condition_mask(torch.zeros(shape[0], dtype=torch.int64), shape)
        latent = normalise_latent(self._encode(first_frames), *self._statistics(shape[2])) * self.edm.sigma_data
        given = torch.zeros(shape, device=latent.device)
        given[:, :, : latent.shape[2]] = latent
        return given, condition_mask(torch.full((shape[0],), latent.shape[2]), shape)

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
