"""NeMo's Megatron strategy, made to run on CPU and GPU by one code path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.utils import get_model_config
from nemo import lightning as nl
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.lightning import _strategy_lib, megatron_parallel
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir, init_model_parallel
from torch import nn

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel import cpu
from nemo_cosmos.parallel.fsdp import FullyShardedDataParallel, write_as_distributed_optimizer
from nemo_cosmos.parallel.host_memory import keep_freed_memory
from nemo_cosmos.parallel.startup import (
    check_layout,
    close_ended_groups,
    end_model_parallel,
    save_checkpoints_in_process,
    save_next_checkpoint_apart,
    seed_ranks,
)


@contextlib.contextmanager
def _wrapping_by(wrapper: type[nn.Module]) -> Iterator[None]:
    """While open, NeMo wraps models by this class: it takes no other where Megatron is to train them."""
    ddp, megatron_parallel.DDP = megatron_parallel.DDP, wrapper
    try:
        yield
    finally:
        megatron_parallel.DDP = ddp


@contextlib.contextmanager
def _waiting_for_the_gpu(parallel: megatron_parallel.MegatronParallel) -> Iterator[None]:
    """While open, models are wrapped once the GPU has done all that was asked of it, and it is waited for.

    NeMo wraps on a stream of its own, which waits for no weight to be there and is not waited for.
    """
    init_ddp = parallel.init_ddp

    def wrapped() -> None:
        torch.cuda.synchronize()
        init_ddp()
        torch.cuda.synchronize()

    parallel.init_ddp = wrapped
    try:
        yield
    finally:
        del parallel.init_ddp  # the class has its own


class CosmosMegatronStrategy(nl.MegatronStrategy):
    """`nl.MegatronStrategy` without its calls to CUDA, with reproducible seeds and early layout checks.

    What differs from NeMo's:

    - Without CUDA, Megatron is prepared for the CPU (`nemo_cosmos.parallel.cpu`) and ranks talk over gloo.
    - On a GPU the wrap for Megatron's DDP waits for the weights, and PyTorch's Adam, which Megatron takes where neither
      TransformerEngine nor Apex is installed, saves and loads its states.
    - Metrics are logged from where they are, not pinned and copied to "cuda".
    - Every step is seeded from `seed` and the step's number, so a resumed run draws what an uninterrupted one would.
    - A layout that does not fit the number of ranks is refused before any weight is allocated. So are latents that do
      not fit the model, where the data module has their `cache_cards`, and may have `is_packed` and `with_actions`,
      and the LightningModule has a method `check_data`.
    - A callback with a method `write_beside_checkpoint(trainer, directory)` may add files to a checkpoint while it
      still counts as unfinished.
    - `fsdp="pytorch"`, which NeMo's refuses, shards the weights by `nemo_cosmos.parallel.fsdp`. The LightningModule
      must have a method `check_fsdp`, which refuses what cannot be sharded before it is built. Checkpoints are those of
      the distributed optimizer in its reshardable form.

    Args:
        seed: Base of the random states (dropout, and first weights of models that are drawn from these).
        ddp: Megatron's DDP configuration; None gives the default one with a check for NaN gradients.
        fsdp: `pytorch` for fully sharded weights, or None for Megatron's DDP.
        **kwargs: As for `nl.MegatronStrategy`.

    Raises:
        UserError: `fsdp` is not one of these, or another argument does not go with it.
    """

    def __init__(
        self,
        *,
        seed: int = 1234,
        ddp: DistributedDataParallelConfig | None = None,
        fsdp: Literal["pytorch"] | None = None,
        **kwargs: Any,  # noqa: ANN401 - NeMo's own arguments
    ) -> None:
        if fsdp not in (None, "pytorch"):
            raise user_error("fsdp", fsdp, "'pytorch' or None", "Checkpoints of other kinds would fit no other layout.")
        super().__init__(ddp=ddp or DistributedDataParallelConfig(check_for_nan_in_grad=True), **kwargs)
        self.seed = seed
        self.fsdp = fsdp
        if fsdp is not None:
            self._check_fsdp()
            self.ckpt_optim_fully_reshardable = True

    def _check_fsdp(self) -> None:
        if self.pipeline_model_parallel_size > 1:
            raise user_error(
                "pipeline-parallel size",
                self.pipeline_model_parallel_size,
                "1 with fsdp",
                "Leave fsdp out: the distributed optimizer goes with a pipeline.",
            )
        unwanted = {
            "ddp.overlap_grad_reduce": (self.ddp_config.overlap_grad_reduce, False),
            "ddp.overlap_param_gather": (self.ddp_config.overlap_param_gather, False),
            "num_distributed_optimizer_instances": (self.num_distributed_optimizer_instances, 1),
        }
        for name, (got, expected) in unwanted.items():
            if got != expected:
                raise user_error(name, got, f"{expected} with fsdp", "Leave it out; fsdp overlaps of itself.")

    def connect(self, model: pl.LightningModule) -> None:
        """Attaches a model; where its weights are sharded, its optimizer has nothing left to distribute.

        Raises:
            UserError: The optimizer is to do what it cannot with sharded weights.
        """
        super().connect(model)
        config = getattr(getattr(model, "optim", None), "config", None)
        if self.fsdp is None or not isinstance(config, OptimizerConfig):
            return
        for name in ("fp16", "use_precision_aware_optimizer", "optimizer_cpu_offload"):
            if getattr(config, name):
                raise user_error(name, True, "False with fsdp", "Leave it out, or train without fsdp.")
        config.use_distributed_optimizer = False
        self.ddp_config.use_distributed_optimizer = True  # by which NeMo tells the form of checkpoints

    def setup_distributed(self) -> None:
        """Refuses an impossible layout, then starts the process groups and the random states.

        Raises:
            UserError: The parallel sizes do not fit the number of processes, the data do not fit the model, or its
                weights cannot be sharded.
        """
        if self.root_device.type == "cpu":
            cpu.enable(lightning=True)
            keep_freed_memory()
        elif not HAVE_APEX_OR_TE:
            cpu.enable_torch_adam()
        check_layout(
            self.cluster_environment.world_size(),
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            context=self.context_parallel_size,
        )
        data = self.lightning_module.trainer.datamodule
        if (cards := getattr(data, "cache_cards", ())) and hasattr(self.lightning_module, "check_data"):
            kind = {name: getattr(data, name) for name in ("is_packed", "with_actions") if hasattr(data, name)}
            self.lightning_module.check_data(*cards, **kind)
        if not self.async_save:
            save_checkpoints_in_process()
        # One process may train several models in turn; NeMo would keep the first one's groups.
        end_model_parallel()
        super().setup_distributed()
        init_model_parallel(self.model)
        close_ended_groups()
        if self.fsdp is not None:
            if not hasattr(self.lightning_module, "check_fsdp"):
                name = type(self.lightning_module).__name__
                raise user_error("fsdp", self.fsdp, f"None, for {name} cannot be sharded", "Leave it out.")
            self.lightning_module.check_fsdp()
        self._seed_step(0)

    def init_model_parallel(self) -> None:
        """Shards the weights, or wraps the model for Megatron's DDP, so that its optimizer's states can be saved."""
        on_gpu = self.root_device.type == "cuda"
        waiting = _waiting_for_the_gpu(self.megatron_parallel) if on_gpu else contextlib.nullcontext()
        with waiting, _wrapping_by(FullyShardedDataParallel if self.fsdp else megatron_parallel.DDP):
            super().init_model_parallel()
        # Megatron's reshardable checkpoints gather a buffer without its buckets' padding, and then look parameters up
        # where they stand with it: states of all but the first bucket would go to the wrong parameters.
        for ddp in (chunk.module for chunk in self.megatron_parallel):
            for buffer in ddp.buffers if isinstance(ddp, DistributedDataParallel) else ():
                buffer.numel_unpadded = buffer.numel
                for bucket in buffer.buckets:
                    bucket.numel_unpadded = bucket.grad_data.numel()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Makes the optimizers of a fit. NeMo's own expects them in a validation too, where Lightning makes none."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup_optimizers(trainer)
            for optimizer in self.optimizers if self.fsdp else ():
                write_as_distributed_optimizer(optimizer.mcore_optimizer)

    def training_step(self, dataloader_iter: Iterator, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401 - as NeMo's
        """Forward and backward of one global batch; logs the loss."""
        self._seed_step(self.trainer.global_step + 1)
        with self.precision_plugin.train_step_context():
            for chunk in self.model:
                chunk.zero_grad_buffer()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            output = self.model.training_step(dataloader_iter, *args, **kwargs)
            loss = output if torch.is_tensor(output) else output["loss"]
            # The first rank writes the logs; without this it would log the zero of a stage that computes no loss.
            _strategy_lib._sync_from_last_pipeline_stage(loss, broadcast=False)  # noqa: SLF001 - NeMo's own use
        self._log("global_step", self.trainer.global_step, prog_bar=True)
        self._log("reduced_train_loss", loss, prog_bar=True)
        return output

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401 - as NeMo's
    ) -> Any:  # noqa: ANN401 - as NeMo's
        """One optimizer step; logs the gradient norm before clipping."""
        output = DDPStrategy.optimizer_step(self, optimizer, closure, model, **kwargs)
        if isinstance(optimizer, McoreDistributedOptimizer):
            output, grad_norm, _ = output
            if grad_norm is not None:
                self._log("grad_norm", grad_norm)
        return output

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,  # noqa: ANN401 - as Lightning's
    ) -> None:
        """Writes what callbacks put beside the distributed checkpoint, and that one, whose end makes it count."""
        for callback in self.trainer.callbacks:
            if hasattr(callback, "write_beside_checkpoint"):
                callback.write_beside_checkpoint(self.trainer, ckpt_to_dir(filepath))
        if self.async_save:
            save_next_checkpoint_apart()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        """Restores the optimizers. NeMo's own version builds a CUDA device mesh for them in any case."""
        if self.should_restore_optimizer_states(selective_restore=selective_restore):
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
                optimizer.load_state_dict(state)

    def teardown(self) -> None:
        """Ends the run, after which a process lets go of its model, optimizer and process groups."""
        super().teardown()
        # Through this function NeMo's configuration leads to the optimizer. Its shards of float32 weights lead back to
        # the model by their autograd graph, through which the garbage collector does not see.
        for chunk in getattr(self, "megatron_parallel", None) or ():  # not there when setting up failed
            get_model_config(chunk).finalize_model_grads_func = None

    def _seed_step(self, step: int) -> None:
        # Seeds of the ranks of one step lie within 100,000 of each other; the stride keeps the steps apart.
        seed_ranks(self.seed + 1_000_003 * step, te_rng_tracker=self.use_te_rng_tracker)

    def _log(self, name: str, value: torch.Tensor | float, prog_bar: bool = False) -> None:
        self.lightning_module.log(name, torch.as_tensor(value, dtype=torch.float32), prog_bar=prog_bar, batch_size=1)
