"""Building blocks of a run with the project's defaults: trainer, log, resume and optimizer.

Plain typed arguments, so that recipes use them as `run.Config` or `run.Partial` targets.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.startup import accelerator
from nemo_cosmos.training.checkpoint import CosmosAutoResume, CosmosLogger, CosmosModelCheckpoint
from nemo_cosmos.training.ema import EMA
from nemo_cosmos.training.strategy import CosmosMegatronStrategy


def default_trainer(
    *,
    max_steps: int,
    devices: int = 1,
    num_nodes: int = 1,
    tp: int = 1,
    pp: int = 1,
    vp: int | None = None,
    cp: int = 1,
    sp: bool = False,
    fsdp: Literal["pytorch"] | None = None,
    seed: int = 1234,
    val_every: int | None = None,
    val_batches: int = 0,
    async_save: bool = False,
    precision: Literal["bf16-mixed", "32"] | None = None,
    ema_decay: float | None = None,
    ema_power: float | None = None,
    callbacks: list[pl.Callback] | None = None,
) -> nl.Trainer:
    """A trainer for this machine's devices: over gloo on CPU, over nccl on GPU.

    Args:
        max_steps: Optimizer steps in all, over interruptions.
        devices: Processes (GPUs) per node.
        num_nodes: Nodes.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        vp: Model chunks per pipeline stage (interleaved schedule).
        cp: Context-parallel size.
        sp: Sequence parallelism inside the tensor-parallel group.
        fsdp: `pytorch` shards weights and gradients too over the data- and context-parallel ranks, which else share
            Adam's states alone.
        seed: Base of the random states; see `CosmosMegatronStrategy`.
        val_every: Steps between validations; None validates never.
        val_batches: Global batches per validation.
        async_save: Write checkpoints in the background.
        precision: `bf16-mixed` keeps float32 masters of bf16 weights; None takes it on GPU, and `32` on CPU.
        ema_decay: Keep an average of the weights with this decay; see `EMA`.
        ema_power: Or with this power.
        callbacks: As for Lightning.

    Returns:
        The trainer; checkpoints and logs are added by `default_log`.

    Raises:
        UserError: A value is out of range, or arguments exclude each other.
    """
    on_gpu = accelerator() == "gpu"
    averages = [] if ema_decay is None and ema_power is None else [EMA(decay=ema_decay, power=ema_power)]
    strategy = CosmosMegatronStrategy(
        seed=seed,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        fsdp=fsdp,
        # Where no rank shares weights with another there is nothing to be exchanged meanwhile.
        ddp=_ddp_config(overlap=on_gpu and fsdp is None and devices * num_nodes > tp * pp),
        ckpt_async_save=async_save,
        # The chunks of one rank hold copies of some weights; Megatron's parallel way would write such a weight twice.
        ckpt_parallel_save=vp is None,
        ckpt_parallel_load=vp is None,
        ckpt_optim_fully_reshardable=True,
        replace_progress_bar=False,
    )
    return nl.Trainer(
        accelerator=accelerator(),
        devices=devices,
        num_nodes=num_nodes,
        max_steps=max_steps,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision=precision or ("bf16-mixed" if on_gpu else "32")),
        callbacks=[*averages, *(callbacks or [])],  # averages first: what shows them wants the step's own
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        limit_val_batches=val_batches if val_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )


def _ddp_config(*, overlap: bool) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        check_for_nan_in_grad=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )


def default_log(
    directory: str | Path,
    *,
    save_every: int = 1000,
    keep: int = 2,
    tensorboard: bool = False,
    wandb_project: str | None = None,
) -> nl.NeMoLogger:
    """Where a run writes: logs in `directory`, checkpoints in `directory/checkpoints`.

    Args:
        directory: The run's folder; a run that is started again with the same one goes on there.
        save_every: Optimizer steps between checkpoints; the last step is always saved.
        keep: Checkpoints kept; -1 keeps all.
        tensorboard: Also write `directory/tensorboard`.
        wandb_project: Also log to this project of Weights & Biases, one run for each directory.
    """
    loggers: dict[str, Logger] = {}
    if tensorboard:
        loggers["tensorboard"] = TensorBoardLogger(save_dir=str(directory), name="tensorboard", version="")
    if wandb_project is not None:
        name = str(directory).strip("/").replace("/", "-")
        loggers["wandb"] = WandbLogger(
            project=wandb_project, name=name, version=name, save_dir=str(directory), resume="allow"
        )
    return CosmosLogger(
        explicit_log_dir=str(directory),
        log_global_rank_0_only=True,
        update_logger_directory=False,
        ckpt=CosmosModelCheckpoint(every_n_train_steps=save_every, keep=keep),
        **loggers,
    )


def default_resume(path: str | None = None) -> nl.AutoResume:
    """Goes on from the newest finished checkpoint of the run's folder; from scratch where there is none.

    Args:
        path: A checkpoint to go on from instead.
    """
    return CosmosAutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True, resume_from_path=path)


def default_optim(
    *,
    lr: float,
    max_steps: int,
    warmup: int = 0,
    min_lr: float = 0.0,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    clip_grad: float = 1.0,
    decay: Literal["cosine", "linear", "constant"] = "cosine",
) -> nl.MegatronOptimizerModule:
    """Megatron's Adam (state sharded over data-parallel ranks), linear warm-up, then a decay.

    Args:
        lr: Peak learning rate.
        max_steps: Step at which the rate reaches `min_lr`.
        warmup: Steps of linear warm-up.
        min_lr: Final learning rate, of a decay that has one.
        weight_decay: Decoupled; biases and norms have none.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        clip_grad: Largest gradient norm; 0 switches clipping off.
        decay: How the rate falls after the warm-up; `constant` leaves it at its peak, for another stage to go on from.

    Raises:
        UserError: The decay is unknown.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad,
        use_distributed_optimizer=True,
    )
    schedules = {
        "cosine": functools.partial(nl.lr_scheduler.CosineAnnealingScheduler, constant_steps=0),
        "linear": nl.lr_scheduler.WarmupAnnealingScheduler,
        "constant": nl.lr_scheduler.WarmupPolicyScheduler,
    }
    if decay not in schedules:
        raise user_error("decay", decay, f"one of {sorted(schedules)}", "Choose one of them.")
    schedule = schedules[decay](max_steps=max_steps, warmup_steps=warmup, min_lr=min_lr)
    return nl.MegatronOptimizerModule(config, lr_scheduler=schedule)
