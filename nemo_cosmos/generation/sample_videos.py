"""Samples of a diffusion WFM while it trains, as a callback."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from nemo.utils import AppState
from nemo.utils.model_utils import unwrap_model

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.data.latent_cache import denormalise_latent
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.samplers import SAMPLERS, karras_sigmas
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import written_aside
from nemo_cosmos.generation.denoiser import VideoDenoiser
from nemo_cosmos.generation.staged import StagedNetwork
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.tokenizer.statistics import LatentStatistics
from nemo_cosmos.training.ema import EMA
from nemo_cosmos.video_io import resize_frames, to_pixels


class SampleVideos(pl.Callback):
    """Generates held-out samples anew every so many steps, and shows them beside the real ones.

    Writes `samples/step=0001000.png` into the run's folder: for each sample a row of frames of the real video, and
    under it the same frames of the generated one, from its text, actions and as many given frames as training gives at
    most; by the averaged weights where the run keeps them. TensorBoard and Weights & Biases get the same picture where
    they are configured.

    Every rank takes part, so that collectives stay in step; the first one decodes and writes. No random state that
    training uses is touched.

    Args:
        every: Optimizer steps between two pictures.
        tokenizer: What the latents are decoded by; see `nemo_cosmos.checkpoints.load.load_tokenizer`.
        num_samples: Held-out samples, evenly spaced; always the same.
        num_columns: Frames shown of each.
        num_steps: Of the sampler.
        sampler: Name of the sampler.
        guidance: g in cond + g (cond - uncond).
        seed: Of the noise.

    Raises:
        UserError: A number is out of range or the sampler unknown.
    """

    def __init__(
        self,
        *,
        every: int,
        tokenizer: str,
        num_samples: int = 2,
        num_columns: int = 8,
        num_steps: int = 35,
        sampler: str = "euler",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        if min(every, num_samples, num_columns) < 1:
            got = (every, num_samples, num_columns)
            raise user_error("every, num_samples, num_columns", got, "positive numbers", "Correct the recipe.")
        if sampler not in SAMPLERS:
            raise user_error("sampler", sampler, f"one of {sorted(SAMPLERS)}", "Choose one of them.")
        self._every, self._place = every, tokenizer
        self._num_samples, self._num_columns = num_samples, num_columns
        self._num_steps, self._sampler, self._guidance, self._seed = num_steps, sampler, guidance, seed
        self._held_out: Any = None
        self._tokenizer: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the held-out samples, and loads the tokenizer on the first rank.

        Raises:
            UserError: There are no held-out samples, the latents are another tokenizer's, or the model is cut into
                virtual pipeline stages.
        """
        chunks = pl_module.config.virtual_pipeline_model_parallel_size
        if chunks is not None:
            raise user_error("virtual pipeline-parallel size", chunks, "None with SampleVideos", "Leave one out.")
        self._held_out = trainer.datamodule.dataset("heldout")
        if not trainer.is_global_zero:
            return
        self._tokenizer = load_tokenizer(self._place).model.to(current_device())
        theirs = trainer.datamodule.cache_cards[0].tokenizer_fingerprint
        if (ours := self._tokenizer.fingerprint()) != theirs:
            raise user_error(
                "tokenizer of SampleVideos", f"{self._place} ({ours})", f"the latents' ({theirs})", "Give that one."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Draws the picture when it is due."""
        if trainer.global_step % self._every:
            return
        network = unwrap_model(trainer.strategy.megatron_parallel[0].module)
        network.eval()
        with torch.no_grad(), _averaged_weights(trainer):
            rows = self._rows(trainer.datamodule.statistics, pl_module, network)
        network.train()
        if trainer.is_global_zero:
            self._show(frame_sheet(rows), trainer)

    def _rows(
        self, statistics: LatentStatistics, model: pl.LightningModule, network: torch.nn.Module
    ) -> list[np.ndarray]:
        """Frames of real and generated videos in turn; on the first rank only."""
        num_samples, rows = min(self._num_samples, len(self._held_out)), []
        for number in range(num_samples):
            item = self._held_out[number * len(self._held_out) // num_samples]
            item = item["clips"][0] if "clips" in item else item
            real = item["latent"][None].to(current_device())
            latents = (real, self._generate(item, real, model, network, seed=self._seed + number))
            if self._tokenizer is None:
                continue
            moments = statistics.of(real.shape[2])
            for latent in latents:
                frames = to_pixels(self._tokenizer.decode(denormalise_latent(latent, *moments))[0])
                shown = np.linspace(0, len(frames) - 1, min(self._num_columns, len(frames))).round().astype(int)
                rows.append(frames[shown])
        return rows

    def _generate(
        self,
        item: dict[str, torch.Tensor],
        real: torch.Tensor,
        model: pl.LightningModule,
        network: torch.nn.Module,
        *,
        seed: int,
    ) -> torch.Tensor:
        """A normalised latent like the real one."""
        generator = torch.Generator().manual_seed(seed)
        noise, augment_noise = (torch.randn(real.shape, generator=generator).to(real) for _ in range(2))
        num_given = model.conditioning.max_condition_frames if real.shape[2] > 1 else 0
        text_emb = item["text_emb"][None].to(real)
        actions = None
        if model.config.action_dim is not None:
            actions = actions_per_latent_frame(item["actions"][None], model.config.action_frames_per_latent).to(real)
        denoiser = VideoDenoiser(
            network=network if model.config.pipeline_model_parallel_size == 1 else StagedNetwork(network),
            edm=model.edm,
            text_emb=text_emb,
            negative_text_emb=torch.zeros_like(text_emb),
            fps=item["fps"][None],  # on the CPU, for the network reads it as plain numbers
            given=real * model.edm.sigma_data,
            mask=condition_mask(torch.tensor([num_given], device=real.device), real.shape),
            augment_noise=augment_noise,
            guidance=self._guidance,
            actions=actions,
            video2world=model.config.concat_condition_mask,
        )
        return SAMPLERS[self._sampler](denoiser, noise, karras_sigmas(self._num_steps)) / model.edm.sigma_data

    def _show(self, sheet: np.ndarray, trainer: pl.Trainer) -> None:
        from PIL import Image

        path = Path(AppState().log_dir) / "samples" / f"step={trainer.global_step:07d}.png"
        with written_aside(path) as aside:
            Image.fromarray(sheet).save(aside, format="PNG")
        for logger in trainer.loggers:
            _log_picture(logger, sheet, trainer.global_step)


def _averaged_weights(trainer: pl.Trainer) -> AbstractContextManager[None]:
    averages = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
    return contextlib.nullcontext() if averages is None else averages.averaged_weights(trainer)


def frame_sheet(rows: list[np.ndarray]) -> np.ndarray:
    """Lays videos under each other, their frames side by side.

    Args:
        rows: Frames of each video, uint8 [F, H, W, 3]; all are brought to the size of the first.

    Returns:
        uint8 [rows * H, most frames * W, 3], black where a video has fewer frames.
    """
    _, height, width, _ = rows[0].shape
    sheet = np.zeros((len(rows), height, max(len(row) for row in rows), width, 3), np.uint8)
    for line, row in zip(sheet, rows, strict=True):
        line[:, : len(row)] = resize_frames(row, height, width).transpose(1, 0, 2, 3)
    return sheet.reshape(len(rows) * height, -1, 3)


def _log_picture(logger: Logger, sheet: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("samples", sheet, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image("samples", [sheet], step=step)
