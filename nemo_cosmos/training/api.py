"""Entry points of training, in NeMo 2's style."""

from __future__ import annotations

from logging import FileHandler, getLogger
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from nemo import lightning as nl
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.one_logger_callback import OneLoggerNeMoCallback
from nemo.lightning.pytorch.optim import OptimizerModule
from nemo.lightning.pytorch.trainer import configure_no_restart_validation_training_loop
from nemo.utils import logging
from nemo.utils.model_utils import unwrap_model

from nemo_cosmos.files import write_json
from nemo_cosmos.training.callbacks import MetricsWriter, Progress
from nemo_cosmos.training.card import CardWriter
from nemo_cosmos.training.checkpoint import steps_made
from nemo_cosmos.training.load import load_weights


def pretrain(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    *,
    log: nl.NeMoLogger,
    optim: OptimizerModule,
    resume: nl.AutoResume | None = None,
) -> Path:
    """Trains a model, from its first weights or from where an interrupted run of the same folder stood.

    A run that has made its steps is left as it is.

    Writes into the run's folder `metrics.jsonl`, `metrics.csv` and `checkpoints/`, each with a `card.json`.

    Args:
        model: A LightningModule that builds its Megatron module in `configure_model`.
        data: A data module with a `data_sampler`.
        trainer: Made by `default_trainer`, or any with a `CosmosMegatronStrategy`.
        log: Where to write; made by `default_log`.
        optim: Optimizer and schedule; made by `default_optim`.
        resume: Where to go on; None starts from the first weights.

    Returns:
        The run's folder.
    """
    return _fit(model, data, trainer, [CardWriter()], log=log, optim=optim, resume=resume)


def finetune(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    *,
    log: nl.NeMoLogger,
    optim: OptimizerModule,
    resume: nl.AutoResume | None = None,
    base: str | Path | None = None,
    may_lack: tuple[str, ...] = (),
) -> Path:
    """Trains a model on from a finished one.

    Args:
        model: As for `pretrain`; one that starts from a file by itself (`init_from`) needs no `base`.
        data: As for `pretrain`.
        trainer: As for `pretrain`.
        log: As for `pretrain`.
        optim: As for `pretrain`.
        resume: As for `pretrain`; an interrupted run goes on, and `base` is not read again.
        base: Checkpoint folder to start from, in whatever layout it was saved; its averaged weights where it has them.
        may_lack: Prefixes of weights that `base` may lack, because this model adds them.

    Returns:
        The run's folder.

    Raises:
        UserError: A weight of `base` is missing or of another shape.
    """
    parent = str(base or getattr(model, "init_from", None) or "") or None
    callbacks: list[pl.Callback] = [CardWriter(parent=parent)]
    if base is not None:
        callbacks.append(_WarmStart(base, may_lack))
    return _fit(model, data, trainer, callbacks, log=log, optim=optim, resume=resume)


def validate(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    *,
    log: nl.NeMoLogger,
    checkpoint: str | Path,
) -> Path:
    """Measures a checkpoint's loss on the validation set and writes it to `validation.json` in the run's folder.

    Args:
        model: As for `pretrain`.
        data: As for `pretrain`.
        trainer: Made by `default_trainer` with `val_batches`.
        log: Where to write.
        checkpoint: Checkpoint folder; its averaged weights are used where it has them.

    Returns:
        The run's folder.
    """
    directory = _set_up(trainer, log=log, resume=None)
    trainer.callbacks.append(_WarmStart(checkpoint))
    (metrics,) = trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        write_json(directory / "validation.json", {name: float(value) for name, value in metrics.items()})
    return directory


class _WarmStart(pl.Callback):
    """Loads weights once the model stands on its device, unless the run is being resumed."""

    def __init__(self, checkpoint: str | Path, may_lack: tuple[str, ...] = ()) -> None:
        self._checkpoint = checkpoint
        self._may_lack = may_lack

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._load(trainer)
            for optimizer in trainer.strategy.optimizers:
                optimizer.reload_model_params()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._load(trainer)

    def _load(self, trainer: pl.Trainer) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            load_weights(unwrap_model(chunk.module), self._checkpoint, may_lack=self._may_lack)


def _fit(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    callbacks: list[pl.Callback],
    *,
    log: nl.NeMoLogger,
    optim: OptimizerModule,
    resume: nl.AutoResume | None,
) -> Path:
    directory = _set_up(trainer, log=log, resume=resume)
    if trainer.ckpt_path is not None and steps_made(trainer.ckpt_path) >= trainer.max_steps > 0:
        logging.info(f"{directory}: all {trainer.max_steps} steps are made, nothing is left to do.")
        return directory
    if trainer.ckpt_path is not None:
        for holder in (model, model.config):  # the checkpoint has all weights, and the file may be gone
            if getattr(holder, "init_from", None) is not None:
                holder.init_from = None
    # Before the checkpoint callback, which may end the last batch by saving what these have noted.
    trainer.callbacks[:0] = [MetricsWriter(directory), Progress(), *callbacks]
    optim.connect(model)
    trainer.fit(model, data)
    return directory


def _set_up(trainer: nl.Trainer, *, log: nl.NeMoLogger, resume: nl.AutoResume | None) -> Path:
    """Ties log and resume to the trainer; returns the run's folder."""
    _leave_out_unset_telemetry()
    _end_logs_of_former_runs()
    configure_no_restart_validation_training_loop(trainer)
    state = log.setup(trainer, resume_if_exists=getattr(resume, "resume_if_exists", False))
    if resume is not None:
        resume.setup(trainer)
    return Path(state.log_dir)


def _end_logs_of_former_runs() -> None:
    # NeMo would write the lines of each run into the files of all runs before it in this process.
    for logger in map(getLogger, ("nemo_logger", "lightning.pytorch", "megatron.core")):
        for handler in [handler for handler in logger.handlers if isinstance(handler, FileHandler)]:
            logger.removeHandler(handler)
            handler.close()


def _leave_out_unset_telemetry() -> None:
    # NeMo puts OneLogger into every process of rank 0, and the first checkpoint calls it; it raises unless a program
    # has configured it, which is for the program to do.
    group = CallbackGroup.get_instance()
    unset = [
        callback
        for callback in group.callbacks
        if isinstance(callback, OneLoggerNeMoCallback) and callback._provider.config.telemetry_config is None  # noqa: SLF001
    ]
    for callback in unset:
        group.callbacks.remove(callback)
