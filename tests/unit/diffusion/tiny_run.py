"""A tiny DiT trained through `nemo_cosmos.training` on random latents."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.data.datamodule import _MegatronDataModule
from nemo_cosmos.data.packs import PackedSamples, collate_packs
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer
from tests.unit.training.tiny_run import Losses

LATENT = (16, 2, 8, 8)
PICTURE = (16, 1, 8, 8)
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


class Latents(torch.utils.data.Dataset):
    """Sixteen samples of one size."""

    def __init__(self, shape: tuple[int, ...] = LATENT, first_seed: int = 0) -> None:
        self._shape, self._first_seed = shape, first_seed

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self._first_seed + index)
        return {
            "latent": torch.randn(self._shape, generator=generator),
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

    def dataset(self, split: str) -> torch.utils.data.Dataset:
        return Latents()

    def card_fields(self) -> dict[str, str]:
        return {"data": "random latents"}


class AlternatingLatents(RandomLatents):
    """Every second batch is of pictures, three to a sample."""

    def training_samples(self, num_samples: int) -> torch.utils.data.Dataset:
        pictures = Latents(PICTURE, first_seed=100)
        return self.with_pictures(pictures, every=2, num_pictures=3, num_samples=num_samples)


class PackedLatents(RandomLatents):
    """Packs of clips of three sizes, of at most 64 tokens."""

    collate_fn = staticmethod(collate_packs)

    def dataset(self, split: str) -> torch.utils.data.Dataset:
        shapes = (LATENT, PICTURE, (16, 3, 4, 8))
        return PackedSamples(
            [Latents(shape, first_seed=100 * i) for i, shape in enumerate(shapes)],
            [num_tokens(shape) for shape in shapes],
            tokens_per_pack=64,
            seed=0,
        )


def num_tokens(shape: tuple[int, ...]) -> int:
    """Of a latent C, T, H, W."""
    return shape[1] * (shape[2] // 2) * (shape[3] // 2)


def run(
    folder: str | Path,
    *,
    steps: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    data: type[RandomLatents] = RandomLatents,
    config: dict[str, object] | None = None,
    log: dict[str, object] | None = None,
    init_from: str | None = None,
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
        DiffusionModel(tiny_dit(**(config or {})), init_from=init_from),
        data(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size),
        default_trainer(
            max_steps=steps, callbacks=[losses, *trainer_arguments.pop("callbacks", [])], **trainer_arguments
        ),
        log=default_log(folder, **{"save_every": 100, **(log or {})}),
        optim=optim,
        resume=default_resume(),
    )
    return losses.by_step
