"""Recipes that post-train diffusion WFMs."""

from __future__ import annotations

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import EMA_POWER, adam


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

    recipe = _action_finetune(diffusion_tiny, latents, base, max_steps=max_steps, batch_size=16, lr=1e-3, warmup=100)
    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps, ema_power=EMA_POWER)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    return recipe


@with_types
def diffusion_7b_action_finetune(
    latents: str = "runs/latents",
    base: str = "runs/diffusion_7b_video2world/checkpoints/last",
    directory: str = "runs/diffusion_7b_action",
    max_steps: int = 10_000,
    num_nodes: int = 4,
) -> run.Partial:
    """Video2World with actions on the 7B; TP4 with SP, CP2, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The Video2World 7B: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b
    from nemo_cosmos.training import defaults

    tp, cp = 4, 2
    recipe = _action_finetune(
        diffusion_7b,
        latents,
        base,
        max_steps=max_steps,
        batch_size=8 * num_nodes // (tp * cp),
        lr=2**-14.3,
        warmup=2500,
        concat_condition_mask=True,
    )
    recipe.data.micro_batch_size, recipe.data.num_workers = 1, 4
    recipe.trainer = run.Config(
        defaults.default_trainer,
        max_steps=max_steps,
        devices=8,
        num_nodes=num_nodes,
        tp=tp,
        sp=True,
        cp=cp,
        async_save=True,
    )
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=1000)
    return recipe


def _action_finetune(
    size: object, latents: str, base: str, *, max_steps: int, batch_size: int, lr: float, warmup: int, **config: object
) -> run.Partial:
    """What the sizes share; `trainer` and `log` are the caller's."""
    from nemo_cosmos.contracts import ACTION_DIM
    from nemo_cosmos.diffusion.warm_start import ACTION_LAYERS
    from nemo_cosmos.post_training.action import action_conditioned
    from nemo_cosmos.post_training.start import finetune
    from nemo_cosmos.training import defaults

    return run.Partial(
        finetune,
        model=run.Partial(action_conditioned, config=run.Config(size, action_dim=ACTION_DIM, **config)),
        data=base_latents(latents, with_actions=True, micro_batch_size=batch_size, global_batch_size=batch_size),
        optim=adam(lr=lr, max_steps=max_steps, warmup=min(warmup, max_steps // 10), weight_decay=0.01),
        resume=run.Config(defaults.default_resume),
        base=base,
        may_lack=ACTION_LAYERS,
    )


def base_latents(path: str, **settings: object) -> run.Partial:
    """A latent cache as training data, once the base has been found whose statistics it takes."""
    from nemo_cosmos.data.datamodule import LatentDataModule

    return run.Partial(LatentDataModule, path=path, **settings)
