"""A diffusion WFM with its tokenizer and text encoder, ready to generate video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import denormalise_latent, normalise_latent
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS, karras_sigmas
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.denoiser import VideoDenoiser
from nemo_cosmos.tokenizer.statistics import LatentStatistics, Numbers, check_statistics
from nemo_cosmos.video_io import resize_frames, to_model, to_pixels

if TYPE_CHECKING:
    from nemo_cosmos.diffusion.model import CosmosDiT
    from nemo_cosmos.text import TextEncoder
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample; sizes are those of the output video."""

    num_frames: int = 17
    """1 + k times the tokenizer's temporal compression."""
    height: int = 128
    """Pixels."""
    width: int = 128
    """Pixels."""
    fps: float = 10.0
    num_steps: int = 4
    """Few, which suits the tiny models: each step adds its error, and few give nearly the mean of what may come. The
    published models take 35."""
    sampler: str = "euler"
    guidance: float = 0.0
    """g in cond + g (cond - uncond); the published models use 7."""
    sigma_max: float = 80.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown samplers."""
        if self.sampler not in SAMPLERS:
            raise user_error("sampler", self.sampler, f"one of {sorted(SAMPLERS)}", "Choose one of them.")
        if self.guidance < 0 or self.fps <= 0:
            raise user_error("guidance, fps", (self.guidance, self.fps), "guidance >= 0 and fps > 0", "Correct them.")


@dataclass(kw_only=True)
class WorldModel:
    """The parts that generation needs, all in evaluation mode."""

    network: CosmosDiT
    tokenizer: CausalVideoTokenizer
    text_encoder: TextEncoder
    card: CheckpointCard
    """Of the network: its latent statistics and the tokenizer it was trained with."""
    edm: EDM

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
        ours = self.tokenizer.fingerprint()
        if self.card.tokenizer_fingerprint != ours:
            raise UserError(
                f"checkpoint {self.card.model}: was trained on latents of tokenizer {self.card.tokenizer_fingerprint}, "
                f"but the tokenizer given is {ours}. Give the one it was trained with."
            )

    @property
    def device(self) -> torch.device:
        """Where the network runs; the tokenizer must be there too."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[str],
        config: SamplingConfig,
        *,
        first_frames: list[np.ndarray] | None = None,
        actions: np.ndarray | None = None,
        negative_prompt: str = "",
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Generates a batch of videos.

        Args:
            prompts: B texts; empty ones mean no text.
            config: Sizes and sampling.
            first_frames: Per video the frames to go on from, uint8 [F, H, W, 3] with F = 1 + k * temporal compression;
                absent for Text2World.
            actions: float [B, num_frames-1, ACTION_DIM], where the network takes actions.
            negative_prompt: What guidance moves away from.
            seeds: One per video; config.seed + i when absent.
            progress: Show a progress bar.

        Returns:
            B videos, uint8 [num_frames, height, width, 3].

        Raises:
            UserError: A size, a frame count or the actions do not fit the network.
        """
        shape = self._latent_shape(len(prompts), config)
        self._check_conditions(first_frames, actions, len(prompts), config)
        given, mask = self._given(first_frames, shape, config)
        noise, augment_noise = _noise(shape, seeds or [config.seed + i for i in range(len(prompts))])
        denoiser = VideoDenoiser(
            network=self.network,
            edm=self.edm,
            text_emb=self._text(prompts),
            negative_text_emb=self._text([negative_prompt] * len(prompts)),
            fps=torch.full((len(prompts),), config.fps),  # on the CPU, for the network reads it as plain numbers
            given=given,
            mask=mask,
            augment_noise=augment_noise.to(self.device),
            guidance=config.guidance,
            actions=None if actions is None else self._actions(actions),
            video2world=self.network.config.concat_condition_mask,
        )
        sigmas = karras_sigmas(config.num_steps, sigma_max=config.sigma_max)
        latent = (
            SAMPLERS[config.sampler](denoiser, noise.to(self.device), sigmas, progress=progress) / self.edm.sigma_data
        )
        video = self.tokenizer.decode(denormalise_latent(latent, *self._statistics(shape[2])))
        return [to_pixels(one) for one in video]

    def _latent_shape(self, batch: int, config: SamplingConfig) -> torch.Size:
        spatial, temporal = (
            self.tokenizer.tokenizer_config.spatial_compression,
            self.tokenizer.tokenizer_config.temporal_compression,
        )
        token = spatial * self.network.config.patch_spatial
        if config.num_frames < 1 or (config.num_frames - 1) % temporal:
            nearest = 1 + max(0, round((config.num_frames - 1) / temporal)) * temporal
            raise user_error("num_frames", config.num_frames, f"1 + k * {temporal}", f"The nearest is {nearest}.")
        if config.height % token or config.width % token or min(config.height, config.width) < token:
            got = (config.height, config.width)
            nearest = tuple(max(1, round(side / token)) * token for side in got)
            raise user_error("height, width", got, f"multiples of {token}", f"The nearest are {nearest}.")
        frames = 1 + (config.num_frames - 1) // temporal
        channels = self.tokenizer.tokenizer_config.latent_channels
        name = f"latent statistics of {self.card.model}"
        mean, std = self._statistics(frames)
        check_statistics(name, mean, std, num_channels=channels, num_latent_frames=frames)
        return torch.Size([batch, channels, frames, config.height // spatial, config.width // spatial])

    def _check_conditions(
        self, first_frames: list[np.ndarray] | None, actions: np.ndarray | None, batch: int, config: SamplingConfig
    ) -> None:
        takes_frames = self.network.config.concat_condition_mask
        takes_actions = self.network.config.action_dim is not None
        if first_frames is not None and not takes_frames:
            expected = f"none, for {self.card.model} has no condition-mask channel"
            raise user_error("first frames", len(first_frames), expected, "Leave them out, or use a Video2World model.")
        if takes_actions != (actions is not None):
            wanted = "actions" if takes_actions else "no actions"
            raise user_error("actions", actions is not None, f"{wanted} for {self.card.model}", "See its card.")
        if first_frames is not None and len(first_frames) != batch:
            raise user_error("first frames", len(first_frames), f"one entry per prompt ({batch})", "Give as many.")
        if actions is not None and (len(actions) != batch or actions.shape[1] != config.num_frames - 1):
            expected = f"[{batch}, {config.num_frames - 1}, 7]"
            raise user_error("actions", actions.shape, expected, "Give one row per frame after the first.")

    def _given(
        self, first_frames: list[np.ndarray] | None, shape: torch.Size, config: SamplingConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the given frames into the first slots of a latent."""
        given = torch.zeros(shape, device=self.device)
        if first_frames is None:
            return given, condition_mask(torch.zeros(shape[0], dtype=torch.int64, device=self.device), shape)
        pixels = [to_model(resize_frames(f, config.height, config.width)) for f in first_frames]
        if len({p.shape for p in pixels}) > 1 or pixels[0].shape[1] >= config.num_frames:
            got = [p.shape[1] for p in pixels]
            raise user_error("first frames", got, f"equal counts below {config.num_frames}", "Cut them to one length.")
        latent = self.tokenizer.encode(torch.stack(pixels).to(self.device))
        latent = normalise_latent(latent, *self._statistics(shape[2])) * self.edm.sigma_data
        given[:, :, : latent.shape[2]] = latent
        return given, condition_mask(torch.full((shape[0],), latent.shape[2], device=self.device), shape)

    def _statistics(self, num_latent_frames: int) -> tuple[Numbers, Numbers]:
        """Those of what is generated: a frame that is given begins a video, and is no picture."""
        found = LatentStatistics.of_card(self.card).of(num_latent_frames)
        assert found is not None  # by __post_init__
        return found

    def _text(self, prompts: list[str]) -> torch.Tensor:
        """Token states; zeros for an empty prompt, which is how text dropout trains the network."""
        states, _ = self.text_encoder.encode(prompts)
        present = torch.tensor([bool(prompt) for prompt in prompts], dtype=states.dtype)
        return (states * present.view(-1, 1, 1)).to(self.device)

    def _actions(self, actions: np.ndarray) -> torch.Tensor:
        return actions_per_latent_frame(
            torch.as_tensor(actions, dtype=torch.float32), self.tokenizer.tokenizer_config.temporal_compression
        ).to(self.device)


def _noise(shape: torch.Size, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws each video's noise from its own seed, on the CPU: neither batch nor device changes it."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randn(2, *shape[1:], generator=generator))
    noise = torch.stack(drawn)
    return noise[:, 0], noise[:, 1]


def read_first_frames(path: Path, *, num_frames: int, height: int, width: int) -> np.ndarray:
    """Reads the frames to go on from: an image, or the end of a video.

    Args:
        path: A png, jpg or video file.
        num_frames: How many frames are wanted from a video: its last ones.
        height: Pixels.
        width: Pixels.

    Returns:
        uint8 [num_frames or 1, height, width, 3].
    """
    from nemo_cosmos.video_io import read_image, read_video

    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        return resize_frames(read_image(path)[None], height, width)
    frames, _ = read_video(path)
    if len(frames) < num_frames:
        raise user_error(str(path), f"{len(frames)} frames", f"at least {num_frames}", "Give a longer video.")
    return resize_frames(frames[-num_frames:], height, width)
