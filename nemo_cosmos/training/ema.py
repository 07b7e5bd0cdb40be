"""Exponential moving average of the weights, as a callback."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from nemo.utils.model_utils import unwrap_model

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.parallel.masters import MasterShard, master_shards
from nemo_cosmos.parallel.startup import save_next_checkpoint_apart
from nemo_cosmos.parallel.stored_weights import EMA as EMA_FOLDER
from nemo_cosmos.parallel.stored_weights import PREFIX

_WITH_DATA = (ShardedTensor, ShardedTensorFactory)


class EMA(pl.Callback):
    """Averages the weights over the training and saves the average in each checkpoint, in the folder `ema`.

    What is averaged are the optimizer's float32 masters where it has them, and of a distributed optimizer each rank
    averages the piece that it updates: it costs 4 bytes per parameter, divided by the number of all ranks.

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
        self._shards: dict[torch.Tensor, MasterShard] = {}
        self._shadow: dict[torch.Tensor, torch.Tensor] = {}

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step `step`, which counts from 1."""
        return self._decay if self._decay is not None else (1 - 1 / step) ** (self._power + 1)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts from the weights, or goes on from the checkpoint that the trainer resumed."""
        self._shards = master_shards(trainer.strategy.megatron_parallel, trainer.strategy.optimizers)
        self._shadow = {parameter: shard.values.float().clone() for parameter, shard in self._shards.items()}
        if trainer.ckpt_path is not None:
            # NeMo names the folder of the weights inside the checkpoint.
            self._restore(trainer, Path(trainer.ckpt_path).parent / EMA_FOLDER)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Takes in the weights of the step just made."""
        decay = self.decay_at(trainer.global_step)
        for parameter, average in self._shadow.items():
            average.lerp_(self._shards[parameter].values.float(), 1 - decay)

    @contextlib.contextmanager
    def averaged_weights(self, trainer: pl.Trainer) -> Iterator[None]:
        """While open, the model computes with the averages; every rank must open it.

        Then its weights are again what they were, bit for bit; optimizer and averages are left alone.
        """
        for chunk in trainer.strategy.megatron_parallel:
            ddp = chunk.module
            if isinstance(ddp, DistributedDataParallel) and ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)  # else weights still under way would arrive over the averages
        weights = {parameter: parameter.detach().clone() for parameter in self._shadow}
        try:
            with torch.no_grad():
                for parameter, average in self._shadow.items():
                    parameter.copy_(self._shards[parameter].gather(average))
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in weights.items():
                    parameter.copy_(weight)

    @torch.no_grad()
    def write_beside_checkpoint(self, trainer: pl.Trainer, directory: Path) -> None:
        """Saves the average, in the background where the trainer saves so.

        Called by the strategy before it saves the weights, by whose end the checkpoint counts as finished.
        """
        folder = directory / EMA_FOLDER
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        joined = {parameter: self._shards[parameter].join(average) for parameter, average in self._shadow.items()}
        described = {name: entry for name, entry, _ in self._described(trainer, joined)}
        if not trainer.strategy.async_save:
            dist_checkpointing.save(described, str(folder))
            return
        save_next_checkpoint_apart()
        request = dist_checkpointing.save(described, str(folder), async_sharded_save=True)
        # The queue ends saves in the order in which they were begun.
        trainer.strategy.checkpoint_io.async_calls_queue.schedule_async_request(request)

    @torch.no_grad()
    def _restore(self, trainer: pl.Trainer, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: the resumed checkpoint has no averaged weights. Train without EMA, or anew.")
        described = list(self._described(trainer, {}))
        loaded = dist_checkpointing.load({name: entry for name, entry, _ in described}, str(folder))
        for name, _, parameter in described:
            if parameter is not None:
                self._shadow[parameter].copy_(self._shards[parameter].cut(loaded[name]))

    def _described(
        self, trainer: pl.Trainer, joined: dict[torch.Tensor, torch.Tensor | None]
    ) -> Iterator[tuple[str, Any, torch.Tensor | None]]:
        """The average, described as the model describes its weights and under the same names.

        Args:
            trainer: Whose strategy has the model.
            joined: Whole averages. Where there is none, an empty tensor stands for it: only the first of the ranks that
                have the same weights writes them, and in loading all of them are written to.

        Yields:
            Name, description, and the parameter whose average it describes.
        """
        for index, chunk in enumerate(trainer.strategy.megatron_parallel):
            # Chunks of one pipeline stage number their layers from 0; only the names inside the entries are global.
            for name, entry in unwrap_model(chunk.module).sharded_state_dict(prefix=PREFIX).items():
                parameter = entry.data if isinstance(entry, _WITH_DATA) and entry.data in self._shadow else None
                if parameter is not None:
                    average = joined.get(parameter)
                    average = torch.empty(parameter.shape, dtype=torch.float32) if average is None else average
                    changes = {"dtype": average.dtype} if isinstance(entry, ShardedTensor) else {}
                    entry = dataclasses.replace(entry, data=average, **changes)
                yield f"{index}.{name}", entry, parameter
