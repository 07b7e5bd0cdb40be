"""Recipes that train diffusion WFMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types

EMA_POWER = 6.94
"""Averages over about the last tenth of the training. Source: Karras et al. 2024, arXiv 2312.02696, section 3.1."""

MASK = {"concat_condition_mask": True}
"""Field of the network that takes the channel which tells given frames: one input more of the patch embedding.

Post-training loads weights in their own shape and cannot add it, so Text2World is trained with it for Video2World to
start from; the published Text2World has it not, and cannot be such a base.
"""


@with_types
def diffusion_tiny_pretrain(
    latents: str = "runs/latents",
    directory: str = "runs/diffusion_tiny",
    max_steps: int = 6000,
) -> run.Partial:
    """A Cosmos DiT of 6 layers for a CPU, Text2World and, by halves, Video2World on 17-frame latents of 128x128.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny
    from nemo_cosmos.training import api, defaults

    model = _model(diffusion_tiny)
    model.conditioning.max_condition_frames = 1
    return run.Partial(
        api.pretrain,
        model=model,
        data=latent_data(latents, micro_batch_size=8, global_batch_size=8),
        trainer=run.Config(defaults.default_trainer, max_steps=max_steps, ema_power=EMA_POWER),
        log=run.Config(defaults.default_log, directory=directory, save_every=200),
        optim=adam(lr=1e-3, max_steps=max_steps, warmup=min(200, max_steps // 10), weight_decay=0.01),
        resume=run.Config(defaults.default_resume),
    )


@with_types
def diffusion_7b_pretrain(
    latents: str = "runs/latents",
    directory: str = "runs/diffusion_7b",
    max_steps: int = 100_000,
    num_nodes: int = 8,
) -> run.Partial:
    """The published 7B, Text2World at 512p: 57 frames of 640x512, 10,240 tokens; TP4 with SP, CP2, 8 GPUs a node.

    It has one input channel more than the published Text2World; see `MASK`.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    return _pretrain_at_512p(diffusion_7b, latents, directory, max_steps, num_nodes, tp=4, weight_decay=0.1)


@with_types
def diffusion_14b_pretrain(
    latents: str = "runs/latents",
    directory: str = "runs/diffusion_14b",
    max_steps: int = 100_000,
    num_nodes: int = 16,
) -> run.Partial:
    """The published 14B, Text2World at 512p: 57 frames of 640x512, 10,240 tokens; TP8 with SP, CP2, 8 GPUs a node.

    It has one input channel more than the published Text2World; see `MASK`.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    return _pretrain_at_512p(diffusion_14b, latents, directory, max_steps, num_nodes, tp=8, weight_decay=0.2)


def _pretrain_at_512p(
    size: Callable[..., Any],
    latents: str,
    directory: str,
    max_steps: int,
    num_nodes: int,
    *,
    tp: int,
    weight_decay: float,
) -> run.Partial:
    """What the published sizes share.

    Source: arXiv 2501.03575 section 5.1 (optimizer, stages); the layout and the batch are ours.
    """
    from nemo_cosmos.training import api, defaults

    return run.Partial(
        api.pretrain,
        model=_model(size, **MASK),
        data=latent_data(
            latents, micro_batch_size=1, global_batch_size=4 * data_parallel(num_nodes, tp=tp), num_workers=4
        ),
        trainer=trainer_at_512p(max_steps, num_nodes, tp=tp, async_save=True),
        log=run.Config(defaults.default_log, directory=directory, save_every=1000),
        optim=adam(lr=1e-4, max_steps=max_steps, warmup=published_warmup(max_steps), weight_decay=weight_decay),
        resume=run.Config(defaults.default_resume),
    )


GPUS_PER_NODE, CONTEXT_PARALLEL = 8, 2


def data_parallel(num_nodes: int, *, tp: int) -> int:
    """Samples that the published sizes work on at once."""
    return GPUS_PER_NODE * num_nodes // (tp * CONTEXT_PARALLEL)


def trainer_at_512p(max_steps: int, num_nodes: int, *, tp: int, **settings: Any) -> run.Config:  # noqa: ANN401 - of default_trainer
    """The layout of the published sizes: TP with SP inside a node, CP2."""
    from nemo_cosmos.training.defaults import default_trainer

    return run.Config(
        default_trainer,
        max_steps=max_steps,
        devices=GPUS_PER_NODE,
        num_nodes=num_nodes,
        tp=tp,
        sp=True,
        cp=CONTEXT_PARALLEL,
        **settings,
    )


def published_warmup(max_steps: int) -> int:
    """2,500 steps as published; half of a run that is too short for them."""
    return min(2500, max_steps // 2)


def _model(size: Callable[..., Any], **overrides: Any) -> run.Config:  # noqa: ANN401 - fields of DiTConfig
    from nemo_cosmos.diffusion.conditioning import ConditioningConfig
    from nemo_cosmos.diffusion.objective import EDM
    from nemo_cosmos.diffusion.step import DiffusionModel

    return run.Config(
        DiffusionModel,
        config=run.Config(size, **overrides),
        edm=run.Config(EDM),
        conditioning=run.Config(ConditioningConfig),
    )


def latent_data(path: str, **settings: Any) -> run.Config:  # noqa: ANN401 - arguments of LatentDataModule
    """A latent cache as training data."""
    from nemo_cosmos.data.datamodule import LatentDataModule

    return run.Config(LatentDataModule, path=path, **settings)


def adam(*, lr: float, max_steps: int, warmup: int, weight_decay: float, eps: float = 1e-8) -> run.Config:
    """Megatron's Adam with the published betas."""
    from nemo_cosmos.training.defaults import default_optim

    return run.Config(
        default_optim,
        lr=lr,
        max_steps=max_steps,
        warmup=warmup,
        weight_decay=weight_decay,
        betas=(0.9, 0.99),
        eps=eps,
    )
