"""A small autoregressive transformer for `megatron_step.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_cosmos.autoregressive.config import ARConfig, Yarn
from nemo_cosmos.autoregressive.initialization import own_weight
from nemo_cosmos.autoregressive.medusa import medusa_loss, of_later_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.objective import next_token_loss, token_sequences
from tests.distributed.megatron_step import Layout

BATCH, LENGTH, TEXT, VOCABULARY = 2, 24, 5, 45


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step is taken on."""

    grid: tuple[int, int, int]
    overrides: dict[str, Any] = field(default_factory=dict)


WITH_TEXT = {
    "special_tokens": True,
    "extra_pos_embed": "sincos",
    "crossattn_emb_channels": 12,
    "yarn": Yarn(original_grid=(1, 2, 4), beta_fast=1.5, beta_slow=0.1),
}

TASKS = {
    # Begin of video, 20 codes and three times padding; Medusa heads beside the model's own prediction.
    "videos": Task(grid=(2, 2, 5), overrides={**WITH_TEXT, "num_medusa_heads": 2}),
    "actions": Task(grid=(2, 2, 5), overrides={**WITH_TEXT, "action_dim": 7}),
    "tied": Task(grid=(3, 2, 4), overrides={"share_embeddings_and_output_weights": True}),
}


def config_for(layout: Layout) -> ARConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 72,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 18,
        "ffn_hidden_size": 40,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 16,
        "backend": "torch",
    }
    return ARConfig(**{**sizes, **TASKS[layout.task].overrides, **layout.config_fields})


class _AR:
    tasks = tuple(TASKS)

    def build(self, layout: Layout, **stage: Any) -> CosmosAR:
        return CosmosAR(config_for(layout), **stage)

    def size(self, task: str) -> tuple[int, int]:
        return LENGTH, BATCH

    def num_shared(self, task: str) -> int:
        return int(task == "tied")

    def own_slice(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return own_weight(name, whole, parallel_state.get_tensor_model_parallel_group())

    def microbatch(self, task: str, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 + index)
        grid = TASKS[task].grid
        config = config_for(Layout(task=task))
        codes = torch.randint(VOCABULARY, (BATCH, *grid), generator=generator)
        free = torch.rand(codes.shape, generator=generator) < 0.8  # samples do not learn equally many
        text = torch.randn(BATCH, TEXT, 12, generator=generator)
        return {
            "sequences": token_sequences(
                codes, config, num_condition_latents_t=1, loss_mask_BTHW=free, multiple_of=LENGTH
            ),
            "grid": grid,
            "text": text if config.crossattn_emb_channels else None,
            "actions": torch.randn(BATCH, 8, 7, generator=generator) if config.action_dim else None,
        }

    def forward_step(self, data: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(data)
        made, heads = batch["sequences"], model.module.config.num_medusa_heads
        labels = of_later_tokens(made.labels_BS, heads) if heads else made.labels_BS
        output = model(made.tokens_BS, batch["grid"], batch["text"], labels_BS=labels, actions_BFA=batch["actions"])

        def loss(terms: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            own = [term[..., 0] for term in terms] if heads else terms
            loss_B, _ = next_token_loss(*own, made.predicts_BS, made.counted_BS, z_loss_coeff=1e-2)
            if heads:
                loss_B = loss_B + medusa_loss(*terms, of_later_tokens(made.counted_BS, heads))[0]
            return loss_B.mean(), {"loss": loss_B.detach().mean().clone()}

        return output, loss


AR = _AR()
