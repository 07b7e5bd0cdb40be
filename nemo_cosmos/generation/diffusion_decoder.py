"""Discrete tokens to video by the diffusion decoder, ready to use in place of a discrete tokenizer's own decoder.

Letters: B = videos, C = channels, T H W = latent frames, rows, columns, L = text tokens, D = width of a text token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn import functional

from nemo_cosmos.autoregressive.diffusion_decoder.denoiser import TokenDenoiser
from nemo_cosmos.autoregressive.diffusion_decoder.windows import reflected
from nemo_cosmos.checkpoints.diffusion_decoder import StoredDiffusionDecoder, find_diffusion_decoder
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import denormalise_latent
from nemo_cosmos.diffusion.config import check_layout
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import SAMPLERS, karras_sigmas
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.loading import place_network, text_encoder_of
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.generation.staged import StagedNetwork
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.first_rank import on_first_rank
from nemo_cosmos.parallel.startup import initialize, world_size
from nemo_cosmos.text import load_text_encoder
from nemo_cosmos.tokenizer.statistics import LatentStatistics, check_statistics
from nemo_cosmos.tokenizer.streaming import decode_stream

if TYPE_CHECKING:
    from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
    from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
    from nemo_cosmos.text import CachedTextEncoder
    from nemo_cosmos.tokenizer.model import CausalVideoTokenizer


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to decode. Fields that are None take the model's own value: see `PUBLISHED` and `TINY`."""

    num_steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """g in cond + g (cond - uncond); 0 is none."""
    sampler: str | None = None
    """One of `nemo_cosmos.diffusion.samplers.SAMPLERS`."""
    sigma_max: float | None = None
    """First noise level."""
    sigma_min: float | None = None
    """Last noise level before the clean end."""
    window: int | None = None
    """Latent frames that the network sees at once."""
    overlap: int = 2
    """Latent frames that two windows share."""
    fps: float | None = None
    """Frames per second of the video."""
    prompt: str | None = None
    """Stands for what a video shows where that is not known."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown samplers and impossible numbers.

        Raises:
            UserError: A value cannot be.
        """
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise user_error("sampler", self.sampler, f"one of {sorted(SAMPLERS)}", "Choose one of them.")
        for name, least in (("guidance", 0), ("fps", 1e-3), ("num_steps", 1), ("window", 1), ("overlap", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise user_error(name, value, f"at least {least}", "Correct it.")

    def for_model(self, config: DiffusionDecoderConfig) -> Self:
        """Fills fields that are None with the values of the model's size."""
        defaults = PUBLISHED if config.hidden_size == 4096 else TINY
        return dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )


PUBLISHED: dict[str, Any] = {
    "num_steps": 15,
    "guidance": 1.8,
    "sampler": "euler",
    "sigma_max": 8.0,
    "sigma_min": 0.02,
    "window": 8,
    "fps": 24.0,
    "prompt": "high quality, 4k, high definition, smooth video",
}
"""Of the 7B: `DiffusionDecoderSamplingConfig` of NVIDIA cosmos-predict1, whose own scheduler begins at level 80 though
that says 8; 8 latent frames are the 57 of training."""

TINY: dict[str, Any] = {**PUBLISHED, "window": 3, "fps": 10.0, "prompt": ""}
"""Of all other sizes."""


@dataclass(kw_only=True)
class DiffusionDecoder:
    """The parts that decoding needs, all in evaluation mode."""

    config: DiffusionDecoderConfig
    """The network's, with its parallel layout."""
    network: Stage[DiffusionDecoderDiT]
    tokenizer: Stage[CausalVideoTokenizer]
    """The continuous one, whose latents are drawn."""
    text_encoder: Stage[CachedTextEncoder]
    card: CheckpointCard
    edm: EDM = dataclasses.field(default_factory=EDM)

    def __post_init__(self) -> None:
        """Refuses a continuous tokenizer that the network was not trained with.

        Raises:
            UserError: The fingerprints differ, or the card lacks the latent statistics.
        """
        if self.card.tokenizer_fingerprint is None or self.card.latent_mean is None or self.card.latent_std is None:
            raise UserError(
                f"checkpoint {self.card.model}: its card lacks the tokenizer or the latent statistics. Convert it "
                "again with --tokenizer and --statistics."
            )
        ours = self.tokenizer.use(lambda tokenizer: tokenizer.fingerprint())
        if ours != self.card.tokenizer_fingerprint:
            raise UserError(
                f"checkpoint {self.card.model}: draws latents of tokenizer {self.card.tokenizer_fingerprint}, but the "
                f"tokenizer given is {ours}. Give the one it was trained with."
            )

    def check_tokens_of(self, fingerprint: str) -> None:
        """Refuses the tokens of a discrete tokenizer that the network was not trained with.

        Args:
            fingerprint: The discrete tokenizer's. A card that tells none, as of published weights, lets all pass.

        Raises:
            UserError: It is another one.
        """
        if self.card.token_fingerprint not in (None, fingerprint):
            raise UserError(
                f"checkpoint {self.card.model}: takes tokens of tokenizer {self.card.token_fingerprint}, not of "
                f"{fingerprint}. Give a decoder that was trained with it, or leave the diffusion decoder out."
            )

    def decode(
        self,
        tokens_BTHW: torch.Tensor,
        config: DecodingConfig | None = None,
        *,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Makes video of tokens, as `CausalVideoTokenizer.decode` does; all ranks of a layout call it alike.

        Args:
            tokens_BTHW: Codes, int [B, 1 + k, h, w], of any size and length.
            config: How; what it leaves out takes the model's own value.
            prompts: What the videos show, B texts; `config.prompt` for all when absent.
            seeds: Of the noise, one per video; config.seed + i when absent.
            progress: Show a progress bar.

        Returns:
            Float [B, 3, 1 + k c_t, H, W] in [-1, 1], on the CPU.

        Raises:
            UserError: An argument does not fit the model, the layout or another one.
        """
        latent = self.sample(tokens_BTHW, config, prompts=prompts, seeds=seeds, progress=progress)
        statistics = LatentStatistics.of_card(self.card).of(latent.shape[2])
        assert statistics is not None  # by __post_init__
        plain = denormalise_latent(latent / self.edm.sigma_data, *statistics)

        def decode(tokenizer: CausalVideoTokenizer) -> torch.Tensor:
            chunks = decode_stream(tokenizer, plain.split(_FRAMES_AT_ONCE, dim=2))
            return torch.cat([chunk.clamp(-1, 1).cpu() for chunk in chunks], dim=2)

        return self.tokenizer.use(decode)

    def sample(
        self,
        tokens_BTHW: torch.Tensor,
        config: DecodingConfig | None = None,
        *,
        prompts: list[str] | None = None,
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Draws the latents that `decode` decodes.

        Returns:
            B C T H W, normalised and times `edm.sigma_data`.
        """
        config = (config or DecodingConfig()).for_model(self.config)
        if tokens_BTHW.ndim != 4 or tokens_BTHW.is_floating_point():
            got = (tuple(tokens_BTHW.shape), tokens_BTHW.dtype)
            raise user_error("tokens", got, "integers [B, T, H, W]", "Give what a discrete tokenizer's encode gives.")
        low, high = int(tokens_BTHW.min()), int(tokens_BTHW.max())
        if low < 0 or high >= self.config.token_vocab_size:
            expected = f"codes below {self.config.token_vocab_size}"
            raise user_error("tokens", (low, high), expected, "Give those of the tokenizer it was trained with.")
        batch, frames, height, width = tokens_BTHW.shape
        times = self.config.token_upsampling
        tokens = self._filled(tokens_BTHW, max(frames, config.window))
        shape = (self.config.in_channels, tokens.shape[1], *(times * size for size in tokens.shape[2:]))
        self._check_size(shape, frames, config.window)
        noise = _noise(shape, batch, config.seed, seeds)
        text_BLD = self._text([config.prompt] * batch if prompts is None else prompts, batch)
        sigmas = karras_sigmas(config.num_steps, sigma_max=config.sigma_max, sigma_min=config.sigma_min)

        def sample(network: DiffusionDecoderDiT) -> torch.Tensor:
            device = next(network.parameters()).device
            denoiser = TokenDenoiser(
                network=network if self.config.pipeline_model_parallel_size == 1 else StagedNetwork(network),
                edm=self.edm,
                tokens=tokens.to(device),
                text_emb=text_BLD.to(device),
                fps=torch.full((batch,), config.fps),  # on the CPU: the network reads it as plain numbers
                guidance=config.guidance,
                window=config.window,
                overlap=min(config.overlap, max(config.window - 1, 1)),
            )
            return SAMPLERS[config.sampler](denoiser, noise.to(device), sigmas, progress=progress)

        return self.network.use(sample)[:, :, :frames, : times * height, : times * width]

    def _filled(self, tokens_BTHW: torch.Tensor, num_frames: int) -> torch.Tensor:
        """As many frames as a window has at least, and whole patches, whose last row or column is repeated."""
        places = torch.tensor(reflected(tokens_BTHW.shape[1], num_frames), device=tokens_BTHW.device)
        tokens = tokens_BTHW[:, places]
        times, patch = self.config.token_upsampling, self.config.patch_spatial
        down, right = (_missing(size, times, patch) for size in tokens.shape[2:])
        return functional.pad(tokens.float(), (0, right, 0, down), mode="replicate").to(tokens.dtype)

    def _check_size(self, shape: tuple[int, ...], num_frames: int, window: int) -> None:
        """Refuses latents that the network, its layout or the statistics have no room for."""
        config = self.config
        frames, rows, columns = config.token_grid((window, *shape[2:]))
        sizes = [getattr(config, f"{axis}_parallel_size") for axis in ("tensor_model", "pipeline_model", "context")]
        check_layout(config, *sizes, frames * rows * columns)
        statistics = LatentStatistics.of_card(self.card).of(num_frames)
        name = f"latent statistics of {self.card.model}"
        check_statistics(name, *statistics, num_channels=config.in_channels, num_latent_frames=num_frames)

    def _text(self, prompts: list[str], batch: int) -> torch.Tensor:
        """Token states, B L D on the CPU."""
        if len(prompts) != batch:
            raise user_error("prompts", len(prompts), f"one for each of {batch} videos", "Give as many, or none.")
        # One rank has the encoder in memory and hands out its states: it may be larger than the network.
        return on_first_rank(lambda: self.text_encoder.use(lambda encoder: encoder.encode(prompts)[0]))


_FRAMES_AT_ONCE = 2
"""Latent frames that the tokenizer decodes at a time, which changes nothing in what it gives."""


def _missing(size: int, times: int, patch: int) -> int:
    """Tokens that a row or column lacks until its latents fill whole patches."""
    return next(more for more in range(patch) if (size + more) * times % patch == 0)


def _noise(shape: tuple[int, ...], batch: int, seed: int, seeds: list[int] | None) -> torch.Tensor:
    """N(0, 1), B C T H W: each video's from its own generator, whole and on the CPU, so that no layout changes it."""
    seeds = [seed + i for i in range(batch)] if seeds is None else seeds
    if len(seeds) != batch:
        raise user_error("seeds", len(seeds), f"one for each of {batch} videos", "Give as many, or none.")
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@contextlib.contextmanager
def open_diffusion_decoder(
    checkpoint: str | Path,
    tokenizer: str | Path = "tokenizer_tiny",
    *,
    layout: GenerationLayout | None = None,
    offload: bool = False,
) -> Iterator[DiffusionDecoder]:
    """Loads a diffusion decoder and its continuous tokenizer onto this rank's device, for the time of the block.

    On a GPU the network runs in bf16, on the CPU in float32. May stand within another block that has opened Megatron's
    process groups in the same layout.

    Args:
        checkpoint: Anything `find_diffusion_decoder` takes.
        tokenizer: The continuous one: anything `load_tokenizer` takes.
        layout: How the ranks share the work; on one rank when absent.
        offload: Have the weights of each part in memory only while it works; they are read anew for each use.

    Yields:
        The decoder; process groups stay open until the block ends.

    Raises:
        UserError: Something is missing or does not fit together, or the layout does not fit the ranks or the model.
    """
    layout = layout or GenerationLayout()
    layout.check(world_size())
    source = find_diffusion_decoder(checkpoint)
    with initialize(**layout.groups):
        yield assemble_diffusion_decoder(source, tokenizer, layout, offload=offload)


def assemble_diffusion_decoder(
    source: StoredDiffusionDecoder, tokenizer: str | Path, layout: GenerationLayout, *, offload: bool
) -> DiffusionDecoder:
    """Makes the decoder of parts that load when they are used; the layout's process groups must be open.

    Args:
        source: What `find_diffusion_decoder` gave.
        tokenizer: As `open_diffusion_decoder`.
        layout: How the ranks share the work.
        offload: As `open_diffusion_decoder`.

    Raises:
        UserError: As `open_diffusion_decoder`.
    """
    device, keep = current_device(), not offload
    name = text_encoder_of(source.card, source.config().crossattn_emb_channels)
    return DiffusionDecoder(
        config=source.config(**layout.network),
        network=Stage(lambda: place_network(source.load(**layout.network), layout), keep=keep),
        tokenizer=Stage(lambda: load_tokenizer(tokenizer).model.to(device), keep=keep),
        text_encoder=Stage(lambda: load_text_encoder(name).to(device), keep=keep),
        card=source.card,
    )
