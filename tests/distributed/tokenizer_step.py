"""One training step of a small video tokenizer in any layout, and the same step by plain torch on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.megatron_model import MegatronVideoTokenizer
from nemo_cosmos.tokenizer.tensor_parallel import split_axes

CONTINUOUS = TokenizerConfig(
    channels=8,
    channels_mult=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=4,
    patch_size=2,
    spatial_compression=8,
    temporal_compression=4,
)
"""Two levels of space, one of time, and widths that go up."""
DISCRETE = TokenizerConfig(**{**CONTINUOUS.to_dict(), "channels_mult": (1, 2, 2), "levels": (8, 5, 5, 5)}, z_channels=6)
LENGTHS = (29, 25)
"""Frames of the two micro-batches: 8 and 7 latent ones, which four ranks cannot share alike."""
HEIGHT, WIDTH = 40, 16
"""5 and 2 latent rows and columns."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LR, EPS, DECAY, CLIP = 1e-2, 1e-3, 0.1, 0.5
"""An epsilon far above rounding errors: else Adam would turn the sign of a gradient that is zero into a step."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups; what is left of the ranks is data parallel."""

    architecture: TokenizerConfig = CONTINUOUS
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    axis: str = "height"
    data: int = 1
    recompute: bool = False
    distributed_optimizer: bool = False

    @property
    def groups(self) -> dict[str, int]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}

    def config(self) -> TransformerConfig:
        """Megatron's, whose transformer fields have no meaning here."""
        return TransformerConfig(
            num_layers=self.pipeline,
            hidden_size=self.tensor,
            num_attention_heads=self.tensor,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            context_parallel_size=self.context,
            pipeline_dtype=torch.float32,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            **(RECOMPUTE if self.recompute else {}),
        )

    def build(self, start: Path) -> MegatronVideoTokenizer:
        """This rank's share of the weights in a folder; the groups must be open."""
        model = MegatronVideoTokenizer(self.architecture, self.config())
        model.load_state_dict(weights.load(start).state_dict())
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        model.split(groups, **stage_ends(None), context_parallel_axis=self.axis)
        return model


def microbatch(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.rand(2, 3, LENGTHS[index], HEIGHT, WIDTH, generator=generator) * 2 - 1


def loss_of(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Weighs pixels and frames unlike, so that pieces put together in another order would show."""
    error = reconstruction - video
    ramp = torch.linspace(0.5, 1.5, error[0, 0].numel()).view(error.shape[2:])
    return (ramp * (error.abs() + error.square())).mean()


@dataclass
class Step:
    """What a step did on this rank, or on the only one."""

    model: nn.Module
    losses: list[float]
    gradients: dict[str, Tensor]
    gradient_norm: float
    optimizer: Any = None

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.model.named_parameters()}


def step_by_torch(start: Path) -> Step:
    """The step on one rank, without Megatron and without anything of this project's parallel code."""
    model = weights.load(start)
    losses = [loss_of(model(video), video) for video in map(microbatch, range(len(LENGTHS)))]
    (sum(losses) / len(losses)).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=DECAY).step()
    return Step(model, [loss.item() for loss in losses], gradients, norm.item())


def step_by_megatron(layout: Layout, start: Path) -> Step:
    """The step on this rank's share, through Megatron's schedule, DDP, gradient finalizer and Adam."""
    model = layout.build(start)
    config = model.config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LR,
            adam_eps=EPS,
            adam_beta1=0.9,
            adam_beta2=0.999,
            weight_decay=DECAY,
            clip_grad=CLIP,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    own = range(parallel_state.get_data_parallel_rank(), len(LENGTHS), layout.data)
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([microbatch(i) for i in own]),
        model=wrapped,
        num_microbatches=len(own),
        seq_length=1,  # stages tell each other
        micro_batch_size=2,
        forward_only=False,
    )
    gradients = {name: weight.main_grad.clone() for name, weight in model.named_parameters()}
    _, norm, _ = optimizer.step()
    return Step(model, [float(entry["loss"]) for entry in losses], gradients, float(norm), optimizer)


def _forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
    video = next(data)

    def loss(reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = loss_of(reconstruction, video)
        return value, {"loss": value.detach().clone()}

    return model(video), loss


def own_slice(model: MegatronVideoTokenizer, name: str, whole: Tensor) -> Tensor:
    """What this rank holds of a whole weight."""
    axis = split_axes(model).get(name)
    if axis is None:
        return whole
    group = parallel_state.get_tensor_model_parallel_group()
    return whole.chunk(group.size(), axis)[group.rank()]
