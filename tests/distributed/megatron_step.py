"""One training step of a small model in any layout, through Megatron's schedule, DDP, gradient finalizer and Adam.

A `Trial` says which model: `dit_step.DIT` and `ar_step.AR`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.tensor import DTensor

from nemo_cosmos.parallel.fsdp import FullyShardedDataParallel, write_as_distributed_optimizer
from nemo_cosmos.parallel.stages import stage_ends

NUM_MICROBATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups; what is left of the ranks is data parallel."""

    task: str = "videos"
    """Which of the trial's tasks."""
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    fsdp: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def groups(self) -> dict[str, int | None]:
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual,
            "context": self.context,
        }

    @property
    def config_fields(self) -> dict[str, Any]:
        """Of Megatron's configuration."""
        return {
            **self.overrides,
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "context_parallel_size": self.context,
            "sequence_parallel": self.sequence_parallel,
        }


class Trial(Protocol):
    """A model, and what it is trained on."""

    tasks: tuple[str, ...]

    def build(self, layout: Layout, **stage: Any) -> torch.nn.Module:
        """A chunk of the model; `stage` holds the arguments that say which."""

    def num_shared(self, task: str) -> int:
        """Weights that the first and the last pipeline stage have in common."""

    def own_slice(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a whole parameter."""

    def microbatch(self, task: str, index: int) -> Any:
        """The same on all ranks."""

    def size(self, task: str) -> tuple[int, int]:
        """Tokens of a sample, samples of a micro-batch."""

    def forward_step(self, data: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        """As Megatron's schedules call it."""


def build(trial: Trial, layout: Layout) -> list[torch.nn.Module]:
    """This rank's model chunks."""
    stages = range(layout.virtual) if layout.virtual else [None]
    return [trial.build(layout, vp_stage=stage, **stage_ends(stage)) for stage in stages]


def named_parameters(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """All parameters of this rank under the names they have on one rank; copies occur once per chunk."""
    named = [(name, tensor) for chunk in chunks for name, tensor in chunk.global_tensors()]
    return [(name, tensor) for name, tensor in named if isinstance(tensor, torch.nn.Parameter)]


@torch.no_grad()
def give_every_weight_a_value(trial: Trial, chunks: list[torch.nn.Module], whole_shapes: dict[str, torch.Size]) -> None:
    """Many weights start at zero, which hides errors; the values depend on the name alone."""
    for name, parameter in named_parameters(chunks):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(whole_shapes[name], generator=generator)
        values = 1 + 0.2 * values if values.ndim == 1 else 0.5 * values / values.shape[1] ** 0.5
        parameter.copy_(trial.own_slice(name, values))


@dataclass
class Step:
    """What a step did on this rank."""

    chunks: list[torch.nn.Module]
    losses: list[float]
    gradients: list[tuple[str, torch.Tensor]]
    """After they were added up, before clipping; NaN where the distributed optimizer keeps them on another rank."""
    gradient_norm: float
    optimizer: Any

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, unsharded(parameter.detach())) for name, parameter in named_parameters(self.chunks)]

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's running mean of every parameter's gradient on this rank; not of the distributed optimizer."""
        [optimizer] = self.optimizer.chained_optimizers
        state = optimizer.optimizer.state
        return {
            name: unsharded(state[parameter]["exp_avg"]).clone() for name, parameter in named_parameters(self.chunks)
        }


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """A fully sharded tensor as a whole, any other as it is; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reduced_gradient(parameter: torch.nn.Parameter, wrapped: list[torch.nn.Module]) -> torch.Tensor:
    gradient = unsharded(parameter.main_grad).clone()
    if wrapped[0].ddp_config.use_distributed_optimizer:
        [buffer] = [b for ddp in wrapped for b in ddp.buffers if parameter in b.param_index_map]
        start, stop, bucket_id = buffer.param_index_map[parameter]
        bucket, group = buffer.buckets[bucket_id], buffer.data_parallel_group
        length = bucket.grad_data.numel() // group.size()
        place = torch.arange(start, stop) - bucket.offset
        gradient.view(-1)[place // length != group.rank()] = torch.nan
    return gradient


def train_one_step(trial: Trial, layout: Layout, whole_shapes: dict[str, torch.Size]) -> Step:
    """Builds the model, and takes one step on the global batch."""
    chunks = build(trial, layout)
    give_every_weight_a_value(trial, chunks, whole_shapes)
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    wrapper = FullyShardedDataParallel if layout.fsdp else DistributedDataParallel
    wrapped = [wrapper(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    # An epsilon far above rounding errors: else Adam would turn the sign of a gradient that is zero into a step.
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            adam_eps=1e-3,
            weight_decay=0.1,
            clip_grad=0.5,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        wrapped,
    )
    if layout.fsdp:
        write_as_distributed_optimizer(optimizer)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    own = range(parallel_state.get_data_parallel_rank(), NUM_MICROBATCHES, layout.data)
    data = [iter([trial.microbatch(layout.task, i) for i in own]) for _ in wrapped]
    seq_length, micro_batch_size = trial.size(layout.task)
    losses = get_forward_backward_func()(
        forward_step_func=trial.forward_step,
        data_iterator=data if layout.virtual else data[0],
        model=wrapped if layout.virtual else wrapped[0],
        num_microbatches=len(own),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    gradients = [(name, reduced_gradient(parameter, wrapped)) for name, parameter in named_parameters(chunks)]
    _, gradient_norm, _ = optimizer.step()
    return Step(chunks, [float(entry["loss"]) for entry in losses], gradients, float(gradient_norm), optimizer)


def reference_steps(rank: int, folder: Path, trial: Trial) -> None:
    """The step of each task on one rank, left in a file of the task's name."""
    from nemo_cosmos.parallel import startup

    for task in trial.tasks:
        layout = Layout(task=task)
        with startup.initialize(**layout.groups):
            first = {name: p.detach().clone() for name, p in named_parameters(build(trial, layout))}
            step = train_one_step(trial, layout, {name: p.shape for name, p in first.items()})
            torch.save(
                {
                    "first": first,
                    "losses": step.losses,
                    "gradients": dict(step.gradients),
                    "gradient_norm": step.gradient_norm,
                    "weights": {name: weight.clone() for name, weight in step.weights()},
                    "moments": step.moments(),
                },
                folder / f"{task}.pt",
            )
