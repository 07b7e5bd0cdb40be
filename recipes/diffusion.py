"""Recipes that pretrain diffusion WFMs: the first of four stages.

1. pretrain: Text2World at low resolution.
2. highres_finetune: more pixels and more frames.
3. cooldown_finetune: the same on the best videos, while the learning rate falls to zero.
4. video2world_finetune: some frames are given.

Source: arXiv 2501.03575, section 5.1; `recipes.stages` runs them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import nemo_run as run

from recipes.annotations import with_types

EMA_POWER = 6.94
"""Averages over about the last tenth of the training. Source: Karras et al. 2024, arXiv 2312.02696, section 3.1."""

TOKENIZER_TINY = "tokenizer_tiny"
TOKENIZER_720P = "checkpoints/Cosmos-Tokenize1-CV8x8x8-720p"

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
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_TINY,
) -> run.Partial:
    """A Cosmos DiT of 6 layers for a CPU, Text2World and, by halves, Video2World on 17-frame latents of 128x128.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny
    from nemo_cosmos.training import api, defaults

    model = wfm(run.Config, diffusion_tiny)
    model.conditioning.max_condition_frames = 1
    data = latent_data(run.Config, latents, pictures, pictures_per_sample=3, micro_batch_size=8, global_batch_size=8)
    return run.Partial(
        api.pretrain,
        model=model,
        data=data,
        trainer=run.Config(
            defaults.default_trainer,
            max_steps=max_steps,
            ema_power=EMA_POWER,
            callbacks=samples(sample_every, tokenizer, num_steps=4),
        ),
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
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """The published 7B, Text2World at 512p: 57 frames of 640x512, 10,240 tokens; TP4 with SP, CP2, 8 GPUs a node.

    It has one input channel more than the published Text2World; see `MASK`.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    recipe = _pretrain_at_512p(diffusion_7b, latents, pictures, directory, max_steps, num_nodes, tp=4, weight_decay=0.1)
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_14b_pretrain(
    latents: str = "runs/latents",
    directory: str = "runs/diffusion_14b",
    max_steps: int = 100_000,
    num_nodes: int = 16,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """The published 14B, Text2World at 512p: 57 frames of 640x512, 10,240 tokens; TP8 with SP, CP2, 8 GPUs a node.

    It has one input channel more than the published Text2World; see `MASK`.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    recipe = _pretrain_at_512p(
        diffusion_14b, latents, pictures, directory, max_steps, num_nodes, tp=8, weight_decay=0.2
    )
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_tiny_packed_pretrain(
    latents: tuple[str, ...] = ("runs/latents", "runs/pictures"),
    directory: str = "runs/diffusion_tiny_packed",
    max_steps: int = 6000,
    tokens_per_pack: int = 1024,
) -> run.Partial:
    """The tiny DiT on packs of clips and pictures of whatever sizes.

    Args:
        latents: Folders that the `tokenize` recipe wrote, one for each size.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        tokens_per_pack: Most tokens in a pack; 768 are 17 frames of 128x128.
    """
    recipe = diffusion_tiny_pretrain(directory=directory, max_steps=max_steps)
    recipe.data = _packs(latents, tokens_per_pack, global_batch_size=8)
    return recipe


@with_types
def diffusion_7b_packed_pretrain(
    latents: tuple[str, ...] = ("runs/latents", "runs/pictures"),
    directory: str = "runs/diffusion_7b_packed",
    max_steps: int = 100_000,
    num_nodes: int = 8,
    tokens_per_pack: int = 10_240,
) -> run.Partial:
    """The first stage of the 7B on packs of clips and pictures of whatever sizes; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folders that the `tokenize` recipe wrote with the 720p tokenizer and T5, one for each size.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        tokens_per_pack: Most tokens in a pack; 10,240 are 57 frames of 640x512.
    """
    recipe = diffusion_7b_pretrain(directory=directory, max_steps=max_steps, num_nodes=num_nodes)
    recipe.trainer.tp, recipe.trainer.cp = GPUS_PER_NODE, 1  # packs are not cut over context-parallel ranks
    recipe.data = _packs(
        latents, tokens_per_pack, global_batch_size=4 * data_parallel(num_nodes, tp=GPUS_PER_NODE, cp=1), num_workers=4
    )
    return recipe


def _packs(latents: tuple[str, ...], tokens_per_pack: int, **settings: int) -> run.Config:
    from nemo_cosmos.data.datamodule import PackedLatentDataModule

    return run.Config(PackedLatentDataModule, paths=tuple(latents), tokens_per_pack=tokens_per_pack, **settings)


def _pretrain_at_512p(
    size: Callable[..., Any],
    latents: str,
    pictures: str | None,
    directory: str,
    max_steps: int,
    num_nodes: int,
    *,
    tp: int,
    weight_decay: float,
) -> run.Partial:
    """What the published sizes share.

    Source: arXiv 2501.03575 section 5.1 (optimizer, stages); the layout and the batch are ours. A sample of pictures is
    as many tokens as a video of 8 latent frames.
    """
    from nemo_cosmos.training import api, defaults

    global_batch_size = 4 * data_parallel(num_nodes, tp=tp, cp=CP_512P)
    return run.Partial(
        api.pretrain,
        model=wfm(run.Config, size, **MASK),
        data=latent_data(
            run.Config,
            latents,
            pictures,
            pictures_per_sample=8,
            micro_batch_size=1,
            global_batch_size=global_batch_size,
            num_workers=4,
        ),
        trainer=published_trainer(max_steps, num_nodes, tp=tp, cp=CP_512P),
        log=run.Config(defaults.default_log, directory=directory, save_every=1000),
        optim=adam(
            lr=1e-4,
            max_steps=max_steps,
            warmup=published_warmup(max_steps),
            weight_decay=weight_decay,
            decay="constant",  # the cool-down is a stage of its own
        ),
        resume=run.Config(defaults.default_resume),
    )


GPUS_PER_NODE = 8
CP_512P, CP_720P = 2, 8
"""Published context-parallel sizes: of 10,240 tokens (57 frames of 640x512) and of 56,320 (121 of 1280x704)."""


def data_parallel(num_nodes: int, *, tp: int, cp: int) -> int:
    """Samples that the published sizes work on at once."""
    return GPUS_PER_NODE * num_nodes // (tp * cp)


def published_trainer(max_steps: int, num_nodes: int, *, tp: int, cp: int) -> run.Config:
    """The layout of the published sizes: TP with SP inside a node, CP over it and others; averages as published."""
    from nemo_cosmos.training.defaults import default_trainer

    return run.Config(
        default_trainer,
        max_steps=max_steps,
        devices=GPUS_PER_NODE,
        num_nodes=num_nodes,
        tp=tp,
        sp=True,
        cp=cp,
        async_save=True,
        ema_power=EMA_POWER,
    )


def published_warmup(max_steps: int) -> int:
    """2,500 steps as published; half of a run that is too short for them."""
    return min(2500, max_steps // 2)


def wfm(kind: type, size: Callable[..., Any], **overrides: Any) -> run.Config | run.Partial:  # noqa: ANN401 - fields of DiTConfig
    """A model as `run.Config`, or as `run.Partial` for post-training, which makes it once the base has been found."""
    from nemo_cosmos.diffusion.conditioning import ConditioningConfig
    from nemo_cosmos.diffusion.objective import EDM
    from nemo_cosmos.diffusion.step import DiffusionModel

    return kind(
        DiffusionModel,
        config=run.Config(size, **overrides),
        edm=run.Config(EDM),
        conditioning=run.Config(ConditioningConfig),
    )


def latent_data(
    kind: type,
    path: str,
    pictures: str | None = None,
    **settings: Any,  # noqa: ANN401 - arguments of LatentDataModule
) -> run.Config | run.Partial:
    """A latent cache as training data, with pictures between its videos where there are some; `kind` as for `wfm`."""
    from nemo_cosmos.data.datamodule import LatentDataModule

    return kind(LatentDataModule, path=path, pictures=pictures, **settings)


def samples(every: int | None, tokenizer: str, **settings: Any) -> list[run.Config] | None:  # noqa: ANN401 - of SampleVideos
    """The callback that generates held-out videos every so many steps, where it is asked for."""
    if every is None:
        return None
    from nemo_cosmos.generation.sample_videos import SampleVideos

    return [run.Config(SampleVideos, every=every, tokenizer=tokenizer, **settings)]


def adam(
    *,
    lr: float,
    max_steps: int,
    warmup: int,
    weight_decay: float,
    eps: float = 1e-8,
    decay: Literal["cosine", "linear", "constant"] = "cosine",
) -> run.Config:
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
        decay=decay,
    )
