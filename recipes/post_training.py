"""Recipes that post-train diffusion WFMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import EMA_POWER, MASK, adam, data_parallel, published_warmup, trainer_at_512p


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
    from nemo_cosmos.training import defaults

    recipe = _action_finetune(diffusion_tiny, latents, base)
    recipe.data.micro_batch_size = recipe.data.global_batch_size = 8
    recipe.optim = adam(lr=1e-3, max_steps=max_steps, warmup=min(100, max_steps // 10), weight_decay=0.01)
    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps, ema_power=EMA_POWER)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    return recipe


@with_types
def diffusion_7b_video2world_finetune(
    latents: str = "runs/latents",
    base: str = "runs/diffusion_7b",
    directory: str = "runs/diffusion_7b_video2world",
    max_steps: int = 10_000,
    num_nodes: int = 8,
) -> run.Partial:
    """Video2World on the 7B, half of the samples with one or two latent frames given; TP4 with SP, CP2, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The Text2World 7B that `diffusion_7b_pretrain` trained: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    recipe = _video2world_finetune(diffusion_7b, latents, base)
    return _at_512p(recipe, directory, max_steps, num_nodes, tp=4, weight_decay=0.1)


@with_types
def diffusion_14b_video2world_finetune(
    latents: str = "runs/latents",
    base: str = "runs/diffusion_14b",
    directory: str = "runs/diffusion_14b_video2world",
    max_steps: int = 10_000,
    num_nodes: int = 16,
) -> run.Partial:
    """Video2World on the 14B, half of the samples with one or two latent frames given; TP8 with SP, CP2, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The Text2World 14B that `diffusion_14b_pretrain` trained: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    recipe = _video2world_finetune(diffusion_14b, latents, base)
    return _at_512p(recipe, directory, max_steps, num_nodes, tp=8, weight_decay=0.2)


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
    return _at_512p(recipe, directory, max_steps, num_nodes, tp=4, weight_decay=0.1)


def _at_512p(
    recipe: run.Partial, directory: str, max_steps: int, num_nodes: int, *, tp: int, weight_decay: float
) -> run.Partial:
    """What the published sizes share. The values of the optimizer are the published ones of post-training."""
    from nemo_cosmos.training import defaults

    recipe.data.micro_batch_size, recipe.data.num_workers = 1, 4
    recipe.data.global_batch_size = data_parallel(num_nodes, tp=tp)
    # Averages are not written in the background.
    recipe.trainer = trainer_at_512p(max_steps, num_nodes, tp=tp, ema_power=EMA_POWER, async_save=False)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=1000)
    recipe.optim = adam(
        lr=2**-14.3,
        max_steps=max_steps,
        warmup=published_warmup(max_steps),
        weight_decay=weight_decay,
        eps=1e-10,
    )
    return recipe


def _video2world_finetune(size: Callable[..., Any], latents: str, base: str) -> run.Partial:
    from nemo_cosmos.diffusion.conditioning import ConditioningConfig
    from nemo_cosmos.diffusion.objective import EDM
    from nemo_cosmos.diffusion.step import DiffusionModel

    # As published: a random number of frames from the start, on half of the samples; one or two are what generation
    # is given.
    conditioning = run.Config(ConditioningConfig, min_condition_frames=1, max_condition_frames=2, condition_dropout=0.5)
    model = run.Partial(DiffusionModel, config=run.Config(size, **MASK), edm=run.Config(EDM), conditioning=conditioning)
    return _finetune(model, _base_latents(latents), base)


def _action_finetune(size: Callable[..., Any], latents: str, base: str, **config: bool) -> run.Partial:
    from nemo_cosmos.contracts import ACTION_DIM
    from nemo_cosmos.diffusion.warm_start import ACTION_LAYERS
    from nemo_cosmos.post_training.action import action_conditioned

    model = run.Partial(action_conditioned, config=run.Config(size, action_dim=ACTION_DIM, **config))
    return _finetune(model, _base_latents(latents, with_actions=True), base, may_lack=ACTION_LAYERS)


def _finetune(model: run.Partial, data: run.Partial, base: str, *, may_lack: tuple[str, ...] = ()) -> run.Partial:
    """A post-training that lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.post_training.start import finetune
    from nemo_cosmos.training import defaults

    return run.Partial(
        finetune, model=model, data=data, base=base, may_lack=may_lack, resume=run.Config(defaults.default_resume)
    )


def _base_latents(path: str, **settings: bool) -> run.Partial:
    """A latent cache as training data, once the base has been found whose statistics it takes."""
    from nemo_cosmos.data.datamodule import LatentDataModule

    return run.Partial(LatentDataModule, path=path, **settings)
