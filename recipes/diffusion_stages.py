"""Recipes of the later stages of a diffusion WFM's pretraining.

See `recipes.diffusion` for the first stage, and `recipes.stages` for all in a row. Each starts from the weights,
averaged where they were, of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import (
    CP_720P,
    MASK,
    TOKENIZER_720P,
    TOKENIZER_TINY,
    diffusion_7b_pretrain,
    diffusion_14b_pretrain,
    diffusion_tiny_pretrain,
    latent_data,
    samples,
    wfm,
)
from recipes.post_training import at_published_size, at_tiny_size, finetune_from


@with_types
def diffusion_tiny_highres_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_tiny",
    directory: str = "runs/diffusion_tiny_highres",
    max_steps: int = 2000,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_TINY,
) -> run.Partial:
    """Second stage of the tiny DiT: larger and longer videos.

    Args:
        latents: Folder that the `tokenize` recipe wrote of larger videos.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny

    model = wfm(run.Partial, diffusion_tiny)
    model.conditioning.max_condition_frames = 1  # as in the first stage
    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=3)
    recipe = finetune_from(base, model, data)
    at_tiny_size(recipe, directory, max_steps, lr=5e-4, decay="constant")
    recipe.trainer.callbacks = samples(sample_every, tokenizer, num_steps=4)
    return recipe


@with_types
def diffusion_7b_highres_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_7b",
    directory: str = "runs/diffusion_7b_highres",
    max_steps: int = 50_000,
    num_nodes: int = 8,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Second stage of the 7B: 720p, 121 frames of 1280x704, 56,320 tokens; TP4 with SP, CP8, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of larger videos with the 720p tokenizer and T5.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=16)
    recipe = finetune_from(base, wfm(run.Partial, diffusion_7b, **MASK), data)
    at_published_size(recipe, directory, max_steps, num_nodes, tp=4, cp=CP_720P, weight_decay=0.1, decay="constant")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_14b_highres_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_14b",
    directory: str = "runs/diffusion_14b_highres",
    max_steps: int = 50_000,
    num_nodes: int = 16,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Second stage of the 14B: 720p, 121 frames of 1280x704, 56,320 tokens; TP8 with SP, CP8, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of larger videos with the 720p tokenizer and T5.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=16)
    recipe = finetune_from(base, wfm(run.Partial, diffusion_14b, **MASK), data)
    at_published_size(recipe, directory, max_steps, num_nodes, tp=8, cp=CP_720P, weight_decay=0.2, decay="constant")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_tiny_cooldown_finetune(
    latents: str = "runs/latents_quality",
    base: str = "runs/diffusion_tiny_highres",
    directory: str = "runs/diffusion_tiny_cooldown",
    max_steps: int = 1000,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_TINY,
) -> run.Partial:
    """Third stage of the tiny DiT: the best videos, while the learning rate falls to zero.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny

    model = wfm(run.Partial, diffusion_tiny)
    model.conditioning.max_condition_frames = 1  # as in the first stage
    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=3)
    recipe = finetune_from(base, model, data)
    at_tiny_size(recipe, directory, max_steps, lr=5e-4, decay="linear")
    recipe.trainer.callbacks = samples(sample_every, tokenizer, num_steps=4)
    return recipe


@with_types
def diffusion_7b_cooldown_finetune(
    latents: str = "runs/latents_quality",
    base: str = "runs/diffusion_7b_highres",
    directory: str = "runs/diffusion_7b_cooldown",
    max_steps: int = 10_000,
    num_nodes: int = 8,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Third stage of the 7B: the best videos at 720p, while the learning rate falls to zero.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos with the 720p tokenizer and T5.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=16)
    recipe = finetune_from(base, wfm(run.Partial, diffusion_7b, **MASK), data)
    at_published_size(recipe, directory, max_steps, num_nodes, tp=4, cp=CP_720P, weight_decay=0.1, decay="linear")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_14b_cooldown_finetune(
    latents: str = "runs/latents_quality",
    base: str = "runs/diffusion_14b_highres",
    directory: str = "runs/diffusion_14b_cooldown",
    max_steps: int = 10_000,
    num_nodes: int = 16,
    pictures: str | None = None,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Third stage of the 14B: the best videos at 720p, while the learning rate falls to zero.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos with the 720p tokenizer and T5.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Latents of single frames; every other batch is then of them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=16)
    recipe = finetune_from(base, wfm(run.Partial, diffusion_14b, **MASK), data)
    at_published_size(recipe, directory, max_steps, num_nodes, tp=8, cp=CP_720P, weight_decay=0.2, decay="linear")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_tiny_video2world_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_tiny_cooldown",
    directory: str = "runs/diffusion_tiny_video2world",
    max_steps: int = 2000,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_TINY,
) -> run.Partial:
    """Last stage of the tiny DiT: up to two latent frames are given, with noise on them.

    Args:
        latents: Folder that the `tokenize` recipe wrote.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_tiny

    recipe = finetune_from(base, _video2world(diffusion_tiny), latent_data(run.Partial, latents))
    at_tiny_size(recipe, directory, max_steps, lr=5e-4, decay="cosine")
    recipe.trainer.callbacks = samples(sample_every, tokenizer, num_steps=4)
    return recipe


@with_types
def diffusion_7b_video2world_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_7b_cooldown",
    directory: str = "runs/diffusion_7b_video2world",
    max_steps: int = 10_000,
    num_nodes: int = 8,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Last stage of the 7B: up to two latent frames are given, with noise on them; TP4 with SP, CP8, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_7b

    recipe = finetune_from(base, _video2world(diffusion_7b, **MASK), latent_data(run.Partial, latents))
    at_published_size(recipe, directory, max_steps, num_nodes, tp=4, cp=CP_720P, weight_decay=0.1, decay="constant")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


@with_types
def diffusion_14b_video2world_finetune(
    latents: str = "runs/latents_highres",
    base: str = "runs/diffusion_14b_cooldown",
    directory: str = "runs/diffusion_14b_video2world",
    max_steps: int = 10_000,
    num_nodes: int = 16,
    sample_every: int | None = None,
    tokenizer: str = TOKENIZER_720P,
) -> run.Partial:
    """Last stage of the 14B: up to two latent frames are given, with noise on them; TP8 with SP, CP8, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the 720p tokenizer and T5.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        sample_every: Steps between two pictures of generated held-out videos; None draws none.
        tokenizer: What decodes those; the one that wrote the latents.
    """
    from nemo_cosmos.diffusion.config import diffusion_14b

    recipe = finetune_from(base, _video2world(diffusion_14b, **MASK), latent_data(run.Partial, latents))
    at_published_size(recipe, directory, max_steps, num_nodes, tp=8, cp=CP_720P, weight_decay=0.2, decay="constant")
    recipe.trainer.callbacks = samples(sample_every, tokenizer)
    return recipe


def _video2world(size: Callable[..., Any], **config: bool) -> run.Partial:
    """A model that is given none, one or two latent frames with noise of a level that each sample draws.

    Source: cosmos-predict1, `video2world_7b_example_hdvila` for frames and noise (ln of the level is N(-3, 2));
    `VideoCondBoolConfig` for how often given frames are hidden, which guidance needs.
    """
    model = wfm(run.Partial, size, **config)
    given = model.conditioning
    given.min_condition_frames, given.max_condition_frames, given.condition_dropout = 0, 2, 0.2
    given.augment_sigma, given.augment_p_std = math.exp(-3), 2.0
    return model


STAGES: dict[str, tuple[Callable[..., run.Partial], ...]] = {
    "tiny": (
        diffusion_tiny_pretrain,
        diffusion_tiny_highres_finetune,
        diffusion_tiny_cooldown_finetune,
        diffusion_tiny_video2world_finetune,
    ),
    "7b": (
        diffusion_7b_pretrain,
        diffusion_7b_highres_finetune,
        diffusion_7b_cooldown_finetune,
        diffusion_7b_video2world_finetune,
    ),
    "14b": (
        diffusion_14b_pretrain,
        diffusion_14b_highres_finetune,
        diffusion_14b_cooldown_finetune,
        diffusion_14b_video2world_finetune,
    ),
}
"""Recipes by size, in the order in which they train."""
