"""A tiny autoregressive transformer trained through `nemo_cosmos.training` on random codes."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.autoregressive.step import AutoregressiveModel, NextTokenConfig
from nemo_cosmos.data.datamodule import _MegatronDataModule
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer
from tests.unit.autoregressive.test_model import TEXT, WITH_TEXT, config_for
from tests.unit.training.tiny_run import Losses

GRID = (2, 2, 4)


class Codes(torch.utils.data.Dataset):
    """Sixteen samples of one size."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "tokens": torch.randint(50, GRID, generator=generator, dtype=torch.int32),
            "text_emb": torch.randn(*TEXT, generator=generator),
        }


class RandomCodes(_MegatronDataModule):
    """The same codes whatever the batch sizes."""

    def __init__(self, *, micro_batch_size: int, global_batch_size: int) -> None:
        super().__init__(
            seq_length=16,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=1,
            num_workers=0,
        )

    def dataset(self, split: str) -> torch.utils.data.Dataset:
        return Codes()

    def card_fields(self) -> dict[str, str]:
        return {"data": "random codes"}


def run(
    folder: str | Path,
    *,
    steps: int = 1,
    config: dict[str, object] | None = None,
    log: dict[str, object] | None = None,
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
        AutoregressiveModel(
            config_for(num_layers=4, **{**WITH_TEXT, **(config or {})}), objective=NextTokenConfig(text_dropout=0.3)
        ),
        RandomCodes(micro_batch_size=1, global_batch_size=4),
        default_trainer(max_steps=steps, callbacks=[losses], **trainer_arguments),
        log=default_log(folder, **{"save_every": 100, **(log or {})}),
        optim=optim,
        resume=default_resume(),
    )
    return losses.by_step
