"""A tiny DiT trained through `nemo_cosmos.training` on random latents."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.data.datamodule import _MegatronDataModule
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer
from tests.unit.training.tiny_run import Losses

LATENT = (16, 2, 8, 8)
TEXT_DIM = 12
NUM_TOKENS = 2 * 4 * 4


def tiny_dit(**overrides: object) -> DiTConfig:
    """Four layers of width 72."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 72,
        "num_attention_heads": 4,
        "adaln_lora_dim": 8,
        "crossattn_emb_channels": TEXT_DIM,
        "max_latent_size": (4, 16, 16),
        "uncertainty_channels": 16,
        "concat_condition_mask": True,
    }
    return DiTConfig(**{**sizes, **overrides})


class _Latents(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "latent": torch.randn(LATENT, generator=generator),
            "text_emb": torch.randn(5, TEXT_DIM, generator=generator),
            "fps": torch.tensor(24.0),
        }


class RandomLatents(_MegatronDataModule):
    """Normal latents; the same ones whatever the batch sizes."""

    def __init__(self, *, micro_batch_size: int, global_batch_size: int) -> None:
        super().__init__(
            seq_length=NUM_TOKENS,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=1,
            num_workers=0,
        )

    def dataset(self, split: str) -> _Latents:
        return _Latents()

    def card_fields(self) -> dict[str, str]:
        return {"data": "random latents"}


def run(
    folder: str | Path,
    *,
    steps: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    **trainer_arguments: object,
) -> dict[int, float]:
    """Trains (or goes on) in `folder`.

    Returns:
        Loss by step, of the steps that this process made.
    """
    losses = Losses()
    # An epsilon far above rounding errors: else Adam would turn the sign of a gradient that is zero into a step.
    optim = default_optim(lr=1e-2, min_lr=5e-3, max_steps=10, eps=1e-3)
    pretrain(
        DiffusionModel(tiny_dit()),
        RandomLatents(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size),
        default_trainer(max_steps=steps, callbacks=[losses], **trainer_arguments),
        log=default_log(folder, save_every=100),
        optim=optim,
        resume=default_resume(),
    )
    return losses.by_step
