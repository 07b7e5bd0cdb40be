"""Recipes that post-train autoregressive WFMs with actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.autoregressive import at_published_size, at_tiny_size, finetune, tiny_yarn


@with_types
def autoregressive_tiny_action_finetune(
    latents: str = "runs/tokens",
    base: str = "runs/autoregressive_tiny_cooldown",
    directory: str = "runs/autoregressive_tiny_action",
    max_steps: int = 2000,
) -> run.Partial:
    """Video2World with actions on the tiny size, from the first frame and 16 relative motions.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        base: The pretrained WFM with text: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny_video2world

    recipe = _action_finetune(autoregressive_tiny_video2world, base, latents, yarn=tiny_yarn())
    return at_tiny_size(recipe, directory, max_steps, decay="cosine")


@with_types
def autoregressive_5b_action_finetune(
    latents: str = "runs/tokens",
    base: str = "runs/autoregressive_5b_cooldown",
    directory: str = "runs/autoregressive_5b_action",
    max_steps: int = 10_000,
    num_nodes: int = 4,
) -> run.Partial:
    """Video2World with actions on the 5B, from the first frame and 16 relative motions; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, with T5.
        base: The pretrained WFM with text: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_5b

    recipe = _action_finetune(autoregressive_5b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, decay="cosine")


@with_types
def autoregressive_13b_action_finetune(
    latents: str = "runs/tokens",
    base: str = "runs/autoregressive_13b_cooldown",
    directory: str = "runs/autoregressive_13b_action",
    max_steps: int = 10_000,
    num_nodes: int = 8,
) -> run.Partial:
    """Video2World with actions on the 13B, from the first frame and 16 relative motions; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote, with T5.
        base: The pretrained WFM with text: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_13b

    recipe = _action_finetune(autoregressive_13b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8, decay="cosine")


def _action_finetune(size: Callable[..., Any], base: str, latents: str, **config: Any) -> run.Partial:  # noqa: ANN401 - fields of ARConfig
    from nemo_cosmos.autoregressive.warm_start import ACTION_LAYERS
    from nemo_cosmos.contracts import ACTION_DIM

    recipe = finetune(size, base, latents, may_lack=ACTION_LAYERS, action_dim=ACTION_DIM, **config)
    recipe.data.with_actions = True
    return recipe


RECIPES = (
    autoregressive_tiny_action_finetune,
    autoregressive_5b_action_finetune,
    autoregressive_13b_action_finetune,
)
"""Recipes that post-train with actions."""
