"""Recipes that post-train diffusion WFMs."""

from __future__ import annotations

from pathlib import Path

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import EMA_POWER, adam, latent_data


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
        base: The pretrained WFM: a checkpoint folder, a safetensors file of whole weights with its card beside it, or
            the name of embedded weights.
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
        base: Checkpoint folder of the Video2World 7B, or a safetensors file of its whole weights.
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
    from nemo_cosmos.checkpoints.embedded import WEIGHTS
    from nemo_cosmos.contracts import ACTION_DIM
    from nemo_cosmos.diffusion.warm_start import ACTION_LAYERS
    from nemo_cosmos.post_training.action import action_conditioned
    from nemo_cosmos.training import api, defaults

    place = Path(base) if "/" in base else WEIGHTS / f"{base}.safetensors"
    from_file = place.suffix == ".safetensors"
    card = place.with_suffix(".json") if from_file else place / "card.json"
    model = run.Config(
        action_conditioned,
        config=run.Config(size, action_dim=ACTION_DIM, **config),
        init_from=str(place) if from_file else None,
    )
    data = latent_data(
        latents,
        with_actions=True,
        statistics_of=str(card),
        micro_batch_size=batch_size,
        global_batch_size=batch_size,
    )
    return run.Partial(
        api.finetune,
        model=model,
        data=data,
        optim=adam(lr=lr, max_steps=max_steps, warmup=min(warmup, max_steps // 10), weight_decay=0.01),
        resume=run.Config(defaults.default_resume),
        base=None if from_file else str(place),
        may_lack=ACTION_LAYERS,
    )
