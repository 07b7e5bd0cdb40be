"""Recipes of Medusa heads for autoregressive WFMs: the heads alone learn, so that the model's predictions stay.

Source: Cai et al., https://arxiv.org/abs/2401.10774, 2.2.1 (Medusa-1); FasterDecoding/Medusa, README (learning rate and
its schedule); cosmos-predict1, `autoregressive/configs/base/model_config.py` (7 heads of one layer, merged in one
matrix; the report found 9 to be best). Batches and lengths are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.autoregressive import at_published_size, at_tiny_size, finetune, tiny_yarn

_NUM_HEADS = 7


@with_types
def autoregressive_tiny_medusa_finetune(
    latents: str = "runs/tokens",
    base: str = "runs/autoregressive_tiny",
    directory: str = "runs/autoregressive_tiny_medusa",
    max_steps: int = 2000,
) -> run.Partial:
    """Medusa heads on the tiny size without text; all else stays as it is.

    Args:
        latents: Folder that the `tokenize` recipe wrote, or of Megatron's token files.
        base: The WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny

    return at_tiny_size(_medusa(autoregressive_tiny, base, latents), directory, max_steps, decay="cosine")


@with_types
def autoregressive_tiny_video2world_medusa_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_tiny_cooldown",
    directory: str = "runs/autoregressive_tiny_video2world_medusa",
    max_steps: int = 2000,
) -> run.Partial:
    """Medusa heads on the tiny size with text; all else stays as it is.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        base: The WFM with text: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny_video2world

    recipe = _medusa(autoregressive_tiny_video2world, base, latents, yarn=tiny_yarn())
    return at_tiny_size(recipe, directory, max_steps, decay="cosine")


@with_types
def autoregressive_4b_medusa_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_4b_long",
    directory: str = "runs/autoregressive_4b_medusa",
    max_steps: int = 10_000,
    num_nodes: int = 4,
) -> run.Partial:
    """Medusa heads on the 4B; all else stays as it is; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, or of Megatron's token files.
        base: The WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_4b

    recipe = _medusa(autoregressive_4b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, decay="cosine")


@with_types
def autoregressive_5b_medusa_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_5b_cooldown",
    directory: str = "runs/autoregressive_5b_medusa",
    max_steps: int = 10_000,
    num_nodes: int = 4,
) -> run.Partial:
    """Medusa heads on the 5B; all else stays as it is; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, with T5.
        base: The WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_5b

    recipe = _medusa(autoregressive_5b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, decay="cosine")


@with_types
def autoregressive_12b_medusa_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_12b_long",
    directory: str = "runs/autoregressive_12b_medusa",
    max_steps: int = 10_000,
    num_nodes: int = 8,
) -> run.Partial:
    """Medusa heads on the 12B; all else stays as it is; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, or of Megatron's token files.
        base: The WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_12b

    recipe = _medusa(autoregressive_12b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8, decay="cosine")


@with_types
def autoregressive_13b_medusa_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_13b_cooldown",
    directory: str = "runs/autoregressive_13b_medusa",
    max_steps: int = 10_000,
    num_nodes: int = 8,
) -> run.Partial:
    """Medusa heads on the 13B; all else stays as it is; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, with T5.
        base: The WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_13b

    recipe = _medusa(autoregressive_13b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8, decay="cosine")


RECIPES = (
    autoregressive_tiny_medusa_finetune,
    autoregressive_tiny_video2world_medusa_finetune,
    autoregressive_4b_medusa_finetune,
    autoregressive_5b_medusa_finetune,
    autoregressive_12b_medusa_finetune,
    autoregressive_13b_medusa_finetune,
)
"""All of them."""


def _medusa(size: Callable[..., Any], base: str, latents: str, **config: Any) -> run.Partial:  # noqa: ANN401 - fields of ARConfig
    """A training that lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.autoregressive.warm_start import MEDUSA_HEADS

    recipe = finetune(size, base, latents, may_lack=MEDUSA_HEADS, num_medusa_heads=_NUM_HEADS, **config)
    recipe.model.objective.medusa_only = True
    return recipe
