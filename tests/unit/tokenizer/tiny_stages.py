"""All three stages' losses on a tiny tokenizer and a curated folder; imported by tests, also in processes of theirs."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from nemo_cosmos.data.datamodule import VideoClipDataModule
from nemo_cosmos.tokenizer.adversary import Adversary
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.discriminator import DiscriminatorConfig
from nemo_cosmos.tokenizer.losses import LossConfig, WeightSchedule
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.optical_flow import LucasKanadeFlow
from nemo_cosmos.tokenizer.perceptual import VggPerceptual
from nemo_cosmos.tokenizer.step import TokenizerModel
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer

MINI = TokenizerConfig(channels=8, channels_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4)


class PooledPixels(torch.nn.Module):
    """Two stages of features that need no weights."""

    def __init__(self, name: str = "pooled pixels") -> None:
        super().__init__()
        self.name = name

    def forward(self, x_NCHW: torch.Tensor) -> list[torch.Tensor]:
        return [x_NCHW, F.avg_pool2d(x_NCHW, 4)]


def adversary(start: int = 1, **settings: object) -> Adversary:
    """A discriminator of two levels that the tokenizer hears of from step `start` on."""
    weight = WeightSchedule(values=(0.0, 0.1), boundaries=(start,))
    values = {"weight": weight, "warmup": 2, "num_frames": 5, "lr": 1e-3, **settings}
    return Adversary(DiscriminatorConfig(channels=4, num_levels=2), **values)


def model(judge: Adversary | None, *, features: str = "pooled pixels", **config: object) -> TokenizerModel:
    """Every term has weight; that of the Gram matrices and of the flow from the second step on."""
    later = WeightSchedule(values=(0.0, 0.1), boundaries=(1,))
    loss = LossConfig(perceptual_weight=0.1, gram_weight=later, flow_weight=later)
    return TokenizerModel(
        TokenizerModelConfig(architecture=MINI, loss=loss, **config),
        perceptual=VggPerceptual(PooledPixels(features), num_frames=2, layer_weights=(1.0, 0.5)),
        flow=LucasKanadeFlow(),
        adversary=judge,
    )


class Metrics(pl.Callback):
    """Keeps what each step logged."""

    NAMES = ("reduced_train_loss", "grad_norm", "l1", "perceptual", "adversarial", "discriminator")

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        logged = trainer.callback_metrics
        self.by_step[trainer.global_step] = {name: float(logged[name]) for name in self.NAMES if name in logged}


def run(
    folder: Path,
    curated: Path,
    *,
    steps: int,
    judge: Adversary | None = None,
    features: str = "pooled pixels",
    micro_batch_size: int = 2,
    **trainer_arguments: object,
) -> dict[int, dict[str, float]]:
    """Trains (or goes on) in `folder`, on videos and pictures by turns, saving every second step.

    Returns:
        What was logged, by step, of the steps that this process made.
    """
    metrics = Metrics()
    data = VideoClipDataModule(
        str(curated),
        num_frames=9,
        height=32,
        width=32,
        pictures_every=2,
        pictures_per_sample=2,
        micro_batch_size=micro_batch_size,
        global_batch_size=4,
    )
    pretrain(
        model(judge, features=features),
        data,
        default_trainer(max_steps=steps, callbacks=[metrics], **trainer_arguments),
        log=default_log(folder, save_every=2, keep=-1),
        optim=default_optim(lr=1e-3, max_steps=20, warmup=2, eps=1e-5),
        resume=default_resume(),
    )
    return metrics.by_step
