"""Recipes that post-train diffusion WFMs with actions, and what all recipes that start from a base share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import (
    CP_512P,
    EMA_POWER,
    MASK,
    adam,
    data_parallel,
    latent_data,
    published_trainer,
    published_warmup,
)

Decay = Literal["cosine", "linear", "constant"]
"""How the learning rate falls after its warm-up; see `default_optim`."""


@with_types
def diffusion_tiny_action_finetune(
    latents: str = "runs/latents",
    base: str = "diffusion_tiny_text2world",
    directory: str = "runs/diffusion_tiny_action",
    max_steps: int = 6000,
) -> run.Partial:
    """Video2World with actions on the tiny DiT, from the first frame and 16 relative motions.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        base: The pretrained WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny

    recipe = _action_finetune(diffusion_tiny, latents, base)
    # The first frame and the actions tell nearly all of what comes, and what they tell is learnt where the noise hides
    # the rest: at the published levels, of median 1.7 here, a sample of this size shows through.
    recipe.model.edm.p_mean, recipe.model.edm.p_std = 1.5, 1.2
    return at_tiny_size(recipe, directory, max_steps, lr=1e-3, warmup=100)


@with_types
def diffusion_7b_action_finetune(
    latents: str = "runs/latents",
    base: str = "runs/diffusion_7b_video2world",
    directory: str = "runs/diffusion_7b_action",
    max_steps: int = 10_000,
    num_nodes: int = 4,
) -> run.Partial:
    """Video2World with actions on the 7B; TP4 with SP, CP2, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The Video2World 7B that `diffusion_7b_video2world_finetune` trained, or another: see
            `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    recipe = _action_finetune(diffusion_7b, latents, base, **MASK)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, cp=CP_512P, weight_decay=0.1)


def at_tiny_size(
    recipe: run.Partial,
    directory: str,
    max_steps: int,
    *,
    lr: float,
    warmup: int = 200,
    decay: Decay = "cosine",
) -> run.Partial:
    """What post-trainings of the tiny DiT share."""
    from nemo_cosmos.training import defaults

    recipe.data.micro_batch_size = recipe.data.global_batch_size = 8
    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps, ema_power=EMA_POWER)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    recipe.optim = adam(lr=lr, max_steps=max_steps, warmup=min(warmup, max_steps // 10), weight_decay=0.01, decay=decay)
    return recipe


def at_published_size(
    recipe: run.Partial,
    directory: str,
    max_steps: int,
    num_nodes: int,
    *,
    tp: int,
    cp: int,
    weight_decay: float,
    decay: Decay = "cosine",
) -> run.Partial:
    """What the published sizes share. The values of the optimizer are the published ones of post-training."""
    from nemo_cosmos.training import defaults

    recipe.data.micro_batch_size, recipe.data.num_workers = 1, 4
    recipe.data.global_batch_size = data_parallel(num_nodes, tp=tp, cp=cp)
    recipe.trainer = published_trainer(max_steps, num_nodes, tp=tp, cp=cp)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=1000)
    recipe.optim = adam(
        lr=2**-14.3,
        max_steps=max_steps,
        warmup=published_warmup(max_steps),
        weight_decay=weight_decay,
        eps=1e-10,
        decay=decay,
    )
    return recipe


def _action_finetune(size: Callable[..., Any], latents: str, base: str, **config: bool) -> run.Partial:
    from nemo_cosmos.contracts import ACTION_DIM
    from nemo_cosmos.diffusion.objective import EDM
    from nemo_cosmos.diffusion.warm_start import ACTION_LAYERS
    from nemo_cosmos.post_training.action import action_conditioned

    model = run.Partial(
        action_conditioned, config=run.Config(size, action_dim=ACTION_DIM, **config), edm=run.Config(EDM)
    )
    data = latent_data(run.Partial, latents, with_actions=True)
    return finetune_from(base, model, data, may_lack=ACTION_LAYERS)


def finetune_from(base: str, model: run.Partial, data: run.Partial, *, may_lack: tuple[str, ...] = ()) -> run.Partial:
    """A post-training that lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.post_training.start import finetune
    from nemo_cosmos.training import defaults

    return run.Partial(
        finetune, model=model, data=data, base=base, may_lack=may_lack, resume=run.Config(defaults.default_resume)
    )
