"""Exponential moving average of the weights, as a callback."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from nemo.utils.model_utils import unwrap_model
from torch import nn

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.training.load import EMA as EMA_FOLDER
from nemo_cosmos.training.load import PREFIX

_WITH_DATA = (ShardedTensor, ShardedTensorFactory)


class EMA(pl.Callback):
    """Averages the weights over the training and saves the average in each checkpoint, in the folder `ema`.

    Every rank averages its own shard in float32, so it costs 4 bytes per parameter of the rank.

    Args:
        decay: Weight of the past in each step: average = decay * average + (1 - decay) * weights.
        power: Instead of `decay`: exponent gamma of the power-function average, whose decay at step t is
            (1 - 1 / t) ** (gamma + 1). Its width is a fixed share of the training's length.
            Source: Karras et al. 2024, arXiv 2312.02696, equation 2.

    Raises:
        UserError: Not exactly one of the two is given, or it is out of range.
    """

    def __init__(self, *, decay: float | None = None, power: float | None = None) -> None:
        if (decay is None) == (power is None):
            raise user_error(
                "EMA", {"decay": decay, "power": power}, "exactly one of decay and power", "Leave one out."
            )
        if decay is not None and not 0 <= decay < 1:
            raise user_error("EMA decay", decay, "a number in [0, 1)", "Use 0.999 or 0.9999.")
        if power is not None and power < 0:
            raise user_error("EMA power", power, "0 or more", "Use 6.94 for a width of 10% of the training.")
        self._decay = decay
        self._power = power
        self._shadow: dict[nn.Parameter, torch.Tensor] = {}

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step `step`, which counts from 1."""
        return self._decay if self._decay is not None else (1 - 1 / step) ** (self._power + 1)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts from the weights, or goes on from the checkpoint that the trainer resumed."""
        self._shadow = {
            parameter: parameter.detach().float().clone()
            for chunk in trainer.strategy.megatron_parallel
            for parameter in chunk.parameters()
            if parameter.requires_grad
        }
        if trainer.ckpt_path is not None:
            # NeMo names the folder of the weights inside the checkpoint.
            self._restore(trainer, Path(trainer.ckpt_path).parent / EMA_FOLDER)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Takes in the weights of the step just made."""
        decay = self.decay_at(trainer.global_step)
        for parameter, average in self._shadow.items():
            average.lerp_(parameter.detach().float(), 1 - decay)

    def write_beside_checkpoint(self, trainer: pl.Trainer, directory: Path) -> None:
        """Saves the average; called by the strategy while the checkpoint still counts as unfinished."""
        folder = directory / EMA_FOLDER
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        dist_checkpointing.save(self._described(trainer), str(folder))

    def _restore(self, trainer: pl.Trainer, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: the resumed checkpoint has no averaged weights. Train without EMA, or anew.")
        described = self._described(trainer)
        averages = {name: entry.data for name, entry in described.items() if isinstance(entry, _WITH_DATA)}
        loaded = dist_checkpointing.load(described, str(folder))
        for name, average in averages.items():
            average.copy_(loaded[name])

    def _described(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The average, described as the model describes its weights and under the same names."""
        described: dict[str, Any] = {}
        for index, chunk in enumerate(trainer.strategy.megatron_parallel):
            # Chunks of one pipeline stage number their layers from 0; only the names inside the entries are global.
            entries = unwrap_model(chunk.module).sharded_state_dict(prefix=PREFIX)
            described |= {f"{index}.{name}": self._averaged(entry) for name, entry in entries.items()}
        return described

    def _averaged(self, entry: Any) -> Any:  # noqa: ANN401 - any entry of a sharded state dict
        if not isinstance(entry, _WITH_DATA) or entry.data not in self._shadow:
            return entry
        average = self._shadow[entry.data]
        changes = {"dtype": average.dtype} if isinstance(entry, ShardedTensor) else {}
        return dataclasses.replace(entry, data=average, **changes)
