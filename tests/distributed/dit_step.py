"""One training step of a small DiT in any layout, through Megatron's schedule, DDP, gradient finalizer and Adam."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.initialization import tensor_parallel_axis
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.parallel.stages import stage_ends

NUM_MICROBATCHES = 2
BATCH, FRAMES, SIZE, TEXT = 2, 3, 8, 5
NUM_TOKENS = FRAMES * (SIZE // 2) ** 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups; what is left of the ranks is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
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


def config_for(layout: Layout) -> DiTConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 72,
        "num_attention_heads": 4,
        "kv_channels": 18,
        "adaln_lora_dim": 8,
        "crossattn_emb_channels": 12,
        "max_latent_size": (4, 16, 16),
        "concat_condition_mask": True,
        "action_dim": 3,
        "action_frames_per_latent": 2,
        "uncertainty_channels": 16,
        "backend": "torch",
    }
    return DiTConfig(
        **{**sizes, **layout.overrides},
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
    )


def build(layout: Layout) -> list[CosmosDiT]:
    """This rank's model chunks."""
    stages = range(layout.virtual) if layout.virtual else [None]
    config = config_for(layout)
    return [CosmosDiT(config, vp_stage=stage, **stage_ends(stage)) for stage in stages]


def named_parameters(chunks: list[CosmosDiT]) -> list[tuple[str, torch.nn.Parameter]]:
    """All parameters of this rank under the names they have on one rank; copies occur once per chunk."""
    named = [(name, tensor) for chunk in chunks for name, tensor in chunk.global_tensors()]
    return [(name, tensor) for name, tensor in named if isinstance(tensor, torch.nn.Parameter)]


def own_slice(name: str, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole parameter."""
    axis = tensor_parallel_axis(name)
    if axis is None:
        return whole
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(size, dim=axis)[rank]


@torch.no_grad()
def give_every_weight_a_value(chunks: list[CosmosDiT], whole_shapes: dict[str, torch.Size]) -> None:
    """Many weights start at zero, which hides errors; the values depend on the name alone."""
    for name, parameter in named_parameters(chunks):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(whole_shapes[name], generator=generator)
        values = 1 + 0.2 * values if values.ndim == 1 else 0.5 * values / values.shape[1] ** 0.5
        parameter.copy_(own_slice(name, values))


def microbatch(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + index)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    condition = torch.zeros(BATCH, 1, FRAMES, SIZE, SIZE)
    condition[:, :, 0] = 1
    return {
        "x": normal(BATCH, 16, FRAMES, SIZE, SIZE),
        "target": normal(BATCH, 16, FRAMES, SIZE, SIZE),
        "c_noise": normal(BATCH),
        "text": normal(BATCH, TEXT, 12),
        "actions": normal(BATCH, FRAMES, 6),
        "condition_mask": condition,
    }


def forward_step(data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    output = model(
        batch["x"],
        batch["c_noise"],
        batch["text"],
        fps=torch.tensor([10.0, 24.0]),
        condition_mask_B1THW=batch["condition_mask"],
        actions_BTA=batch["actions"] if model.module.config.action_dim else None,
    )

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # As the training objective: a plain mean over all tokens, and a term that no token carries.
        logvar = model.module.logvar(batch["c_noise"])
        error = (output - batch["target"]).square().mean(dim=(1, 2, 3, 4))
        value = (error * torch.exp(-logvar) + logvar).mean()
        return value, {"loss": value.detach().clone()}

    return output, loss


@dataclass
class Step:
    """What a step did on this rank."""

    chunks: list[CosmosDiT]
    losses: list[float]
    gradients: list[tuple[str, torch.Tensor]]
    gradient_norm: float
    optimizer: Any

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's running mean of every parameter's gradient on this rank."""
        [optimizer] = self.optimizer.chained_optimizers
        state = optimizer.optimizer.state
        return {name: state[parameter]["exp_avg"].clone() for name, parameter in named_parameters(self.chunks)}


def train_one_step(layout: Layout, whole_shapes: dict[str, torch.Size]) -> Step:
    """Builds the model, and takes one step on the global batch."""
    chunks = build(layout)
    give_every_weight_a_value(chunks, whole_shapes)
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
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
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    own = range(parallel_state.get_data_parallel_rank(), NUM_MICROBATCHES, layout.data)
    data = [iter([microbatch(i) for i in own]) for _ in wrapped]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if layout.virtual else data[0],
        model=wrapped if layout.virtual else wrapped[0],
        num_microbatches=len(own),
        seq_length=NUM_TOKENS,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    gradients = [(name, parameter.main_grad.clone()) for name, parameter in named_parameters(chunks)]
    _, gradient_norm, _ = optimizer.step()
    return Step(chunks, [float(entry["loss"]) for entry in losses], gradients, float(gradient_norm), optimizer)


def reference_step(rank: int, folder: Path, overrides: dict[str, Any]) -> None:
    """The step on one rank, left in `reference.pt`."""
    from nemo_cosmos.parallel import startup

    layout = Layout(overrides=overrides)
    with startup.initialize(**layout.groups):
        first = {name: p.detach().clone() for name, p in named_parameters(build(layout))}
        step = train_one_step(layout, {name: p.shape for name, p in first.items()})
        torch.save(
            {
                "first": first,
                "losses": step.losses,
                "gradients": dict(step.gradients),
                "gradient_norm": step.gradient_norm,
                "weights": {name: p.detach().clone() for name, p in named_parameters(step.chunks)},
                "moments": step.moments(),
            },
            folder / "reference.pt",
        )
