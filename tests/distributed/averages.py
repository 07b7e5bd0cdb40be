"""What a model in training has for weights while it computes with the averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo.utils.model_utils import unwrap_model

from nemo_cosmos.parallel.startup import save_next_checkpoint_apart
from nemo_cosmos.parallel.stored_weights import PREFIX, WEIGHTS
from nemo_cosmos.training.ema import EMA


class KeepAverages(pl.Callback):
    """Saves them after a step, as a checkpoint of any layout.

    Args:
        folder: Where to.
        step: After which.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:
            return
        [averages] = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
        (self._folder / WEIGHTS).mkdir(parents=True, exist_ok=True)
        with averages.averaged_weights(trainer):
            described = {
                f"{index}.{name}": entry
                for index, chunk in enumerate(trainer.strategy.megatron_parallel)
                for name, entry in unwrap_model(chunk.module).sharded_state_dict(prefix=PREFIX).items()
            }
            if trainer.strategy.async_save:  # one may be under way
                save_next_checkpoint_apart()
            dist_checkpointing.save(described, str(self._folder / WEIGHTS))
