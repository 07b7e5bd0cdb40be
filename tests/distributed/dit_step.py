"""A small DiT for `megatron_step.py`, and a diffusion decoder, which is one with tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.initialization import tensor_parallel_axis
from nemo_cosmos.diffusion.model import CosmosDiT
from tests.distributed.megatron_step import Layout

SIZE, TEXT = 8, 5


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step is taken on."""

    frames: int = 3
    batch: int = 2
    overrides: dict[str, Any] = field(default_factory=dict)


TOKENS = {
    "action_dim": None,
    "concat_condition_mask": False,
    "token_vocab_size": 10,
    "token_emb_channels": 3,
    "token_upsampling": 2,
}

TASKS = {
    "videos": Task(),
    "images": Task(frames=1),
    "three images": Task(frames=1, batch=3),
    # So few layers that the gradient buffers of two stages are of unlike sizes.
    "few layers": Task(overrides={"num_layers": 2}),
    "no actions, fixed positions": Task(overrides={"action_dim": None, "extra_pos_embed": "sincos"}),
    "tokens": Task(overrides=TOKENS),
    "tokens of images": Task(frames=1, overrides=TOKENS),
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
    kind = DiffusionDecoderConfig if TASKS[layout.task].overrides is TOKENS else DiTConfig
    return kind(**{**sizes, **TASKS[layout.task].overrides, **layout.config_fields})


class _DiT:
    tasks = tuple(TASKS)

    def build(self, layout: Layout, **stage: Any) -> CosmosDiT:
        config = config_for(layout)
        network = DiffusionDecoderDiT if isinstance(config, DiffusionDecoderConfig) else CosmosDiT
        return network(config, **stage)

    def size(self, task: str) -> tuple[int, int]:
        return TASKS[task].frames * (SIZE // 2) ** 2, TASKS[task].batch

    def num_shared(self, task: str) -> int:
        return 0

    def own_slice(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a whole parameter."""
        axis = tensor_parallel_axis(name)
        if axis is None:
            return whole
        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        return whole.chunk(size, dim=axis)[rank]

    def microbatch(self, task: str, index: int) -> dict[str, torch.Tensor]:
        told = TASKS[task]
        generator = torch.Generator().manual_seed(100 + index)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        latent = (told.batch, 16, told.frames, SIZE, SIZE)
        condition = torch.zeros(told.batch, 1, told.frames, SIZE, SIZE)
        condition[0, :, 0] = 1
        return {
            "x": normal(*latent),
            "target": normal(*latent),
            "c_noise": normal(told.batch),
            "text": normal(told.batch, TEXT, 12),
            "actions": normal(told.batch, told.frames, 6),
            "condition_mask": condition,
            "fps": torch.tensor([10.0, 24.0, 30.0])[: told.batch],
            "tokens": torch.randint(10, (told.batch, told.frames, SIZE // 2, SIZE // 2), generator=generator),
        }

    def forward_step(self, data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch, config = next(data), model.module.config
        conditions = {"condition_mask_B1THW": batch["condition_mask"]}
        if isinstance(config, DiffusionDecoderConfig):
            conditions = {"tokens_BTHW": batch["tokens"]}
        elif config.action_dim:
            conditions["actions_BTA"] = batch["actions"]
        output = model(batch["x"], batch["c_noise"], batch["text"], fps=batch["fps"], **conditions)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            # As the training objective: a plain mean over all tokens, and a term that no token carries.
            logvar = model.module.logvar(batch["c_noise"])
            error = (output - batch["target"]).square().mean(dim=(1, 2, 3, 4))
            value = (error * torch.exp(-logvar) + logvar).mean()
            return value, {"loss": value.detach().clone()}

        return output, loss


DIT = _DiT()
