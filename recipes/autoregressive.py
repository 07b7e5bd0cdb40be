"""Recipes of autoregressive WFMs: four stages of pretraining, and post-training with actions.

1. pretrain: 17 frames, of which the first is given.
2. long_finetune: 33 frames, which the report calls 34; rotary positions of time are extended by YaRN.
3. video2world_finetune: cross-attention to text comes in, and every other batch may be of pictures.
4. cooldown_finetune: the same on the best videos, while the learning rate falls to zero.

How long videos are is told by the caches. The released 4B and 5B have no YaRN, although the report speaks of it, and
neither have they here: give `model.config.yarn` to add it.

Source: arXiv 2501.03575, section 5.2 (stages, z-loss, cool-down of 30,000 steps); cosmos-predict1,
`autoregressive/configs/registry.py` (optimizer). Layouts, batches and the lengths of the other stages are ours.
`recipes.stages` runs the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import GPUS_PER_NODE, data_parallel, latent_data
from recipes.post_training import Decay, finetune_from

TINY_GRID = (3, 16, 16)
"""Tokens of 17 frames of 128x128 in 8x8x8 cells, which the tiny size is first trained on."""

_WARMUP = 5000
_PICTURES_PER_SAMPLE = 5
"""As many tokens as 33 frames."""


@with_types
def autoregressive_tiny_pretrain(
    latents: str = "runs/tokens", directory: str = "runs/autoregressive_tiny", max_steps: int = 4000
) -> run.Partial:
    """A transformer of 6 layers for a CPU, next-token prediction on 17-frame tokens of 128x128 (DV8x8x8-tiny).

    Args:
        latents: Folder that the `tokenize` recipe wrote with that tokenizer, or of Megatron's token files.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny

    recipe = _pretrain(autoregressive_tiny, latents)
    return at_tiny_size(recipe, directory, max_steps)


@with_types
def autoregressive_4b_pretrain(
    latents: str = "runs/tokens",
    directory: str = "runs/autoregressive_4b",
    max_steps: int = 100_000,
    num_nodes: int = 8,
) -> run.Partial:
    """The published 4B on 17 frames of 1024x640, 7,680 tokens (DV8x16x16-720p); TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with that tokenizer, or of Megatron's token files.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_4b

    return at_published_size(_pretrain(autoregressive_4b, latents), directory, max_steps, num_nodes, tp=4)


@with_types
def autoregressive_12b_pretrain(
    latents: str = "runs/tokens",
    directory: str = "runs/autoregressive_12b",
    max_steps: int = 100_000,
    num_nodes: int = 16,
) -> run.Partial:
    """The published 12B on 17 frames of 1024x640, 7,680 tokens (DV8x16x16-720p); TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote with that tokenizer, or of Megatron's token files.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_12b

    recipe = _pretrain(autoregressive_12b, latents, yarn=None)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8)


@with_types
def autoregressive_tiny_long_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_tiny",
    directory: str = "runs/autoregressive_tiny_long",
    max_steps: int = 1000,
) -> run.Partial:
    """Second stage of the tiny size: 33 frames, with YaRN in time.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny

    recipe = finetune(autoregressive_tiny, base, latents, yarn=tiny_yarn())
    return at_tiny_size(recipe, directory, max_steps)


@with_types
def autoregressive_4b_long_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_4b",
    directory: str = "runs/autoregressive_4b_long",
    max_steps: int = 50_000,
    num_nodes: int = 8,
) -> run.Partial:
    """Second stage of the 4B: 33 frames of 1024x640, 12,800 tokens; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_4b

    recipe = finetune(autoregressive_4b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4)


@with_types
def autoregressive_12b_long_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_12b",
    directory: str = "runs/autoregressive_12b_long",
    max_steps: int = 50_000,
    num_nodes: int = 16,
) -> run.Partial:
    """Second stage of the 12B: 33 frames of 1024x640, 12,800 tokens, with YaRN; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_12b

    recipe = finetune(autoregressive_12b, base, latents)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8)


@with_types
def autoregressive_tiny_video2world_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_tiny_long",
    directory: str = "runs/autoregressive_tiny_video2world",
    max_steps: int = 2000,
    pictures: str | None = None,
) -> run.Partial:
    """Third stage of the tiny size: cross-attention to text comes in.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny_video2world

    recipe = _video2world(autoregressive_tiny_video2world, base, latents, pictures, yarn=tiny_yarn())
    return at_tiny_size(recipe, directory, max_steps)


@with_types
def autoregressive_5b_video2world_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_4b_long",
    directory: str = "runs/autoregressive_5b_video2world",
    max_steps: int = 50_000,
    num_nodes: int = 8,
    pictures: str | None = None,
) -> run.Partial:
    """Third stage of the 4B, which becomes the 5B: cross-attention to T5 comes in; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos, with T5.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_5b

    recipe = _video2world(autoregressive_5b, base, latents, pictures)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4)


@with_types
def autoregressive_13b_video2world_finetune(
    latents: str = "runs/tokens_long",
    base: str = "runs/autoregressive_12b_long",
    directory: str = "runs/autoregressive_13b_video2world",
    max_steps: int = 50_000,
    num_nodes: int = 16,
    pictures: str | None = None,
) -> run.Partial:
    """Third stage of the 12B, which becomes the 13B: cross-attention to T5 comes in; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of longer videos, with T5.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_13b

    recipe = _video2world(autoregressive_13b, base, latents, pictures)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8)


@with_types
def autoregressive_tiny_cooldown_finetune(
    latents: str = "runs/tokens_quality",
    base: str = "runs/autoregressive_tiny_video2world",
    directory: str = "runs/autoregressive_tiny_cooldown",
    max_steps: int = 1000,
    pictures: str | None = None,
) -> run.Partial:
    """Last stage of the tiny size: the best videos, while the learning rate falls to zero.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_tiny_video2world

    recipe = finetune(autoregressive_tiny_video2world, base, latents, pictures, yarn=tiny_yarn())
    return at_tiny_size(recipe, directory, max_steps, decay="linear")


@with_types
def autoregressive_5b_cooldown_finetune(
    latents: str = "runs/tokens_quality",
    base: str = "runs/autoregressive_5b_video2world",
    directory: str = "runs/autoregressive_5b_cooldown",
    max_steps: int = 30_000,
    num_nodes: int = 8,
    pictures: str | None = None,
) -> run.Partial:
    """Last stage of the 5B: the best videos, while the learning rate falls to zero; TP4 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos, with T5.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_5b

    recipe = finetune(autoregressive_5b, base, latents, pictures)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, decay="linear")


@with_types
def autoregressive_13b_cooldown_finetune(
    latents: str = "runs/tokens_quality",
    base: str = "runs/autoregressive_13b_video2world",
    directory: str = "runs/autoregressive_13b_cooldown",
    max_steps: int = 30_000,
    num_nodes: int = 16,
    pictures: str | None = None,
) -> run.Partial:
    """Last stage of the 13B: the best videos, while the learning rate falls to zero; TP8 with SP, 8 GPUs a node.

    Args:
        latents: Folder that the `tokenize` recipe wrote of the best videos, with T5.
        base: The third stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
        pictures: Tokens of single frames; every other batch is then of them.
    """
    from nemo_cosmos.autoregressive.config import autoregressive_13b

    recipe = finetune(autoregressive_13b, base, latents, pictures)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=8, decay="linear")


STAGES: dict[str, tuple[Callable[..., run.Partial], ...]] = {
    "autoregressive_tiny": (
        autoregressive_tiny_pretrain,
        autoregressive_tiny_long_finetune,
        autoregressive_tiny_video2world_finetune,
        autoregressive_tiny_cooldown_finetune,
    ),
    "4b": (
        autoregressive_4b_pretrain,
        autoregressive_4b_long_finetune,
        autoregressive_5b_video2world_finetune,
        autoregressive_5b_cooldown_finetune,
    ),
    "12b": (
        autoregressive_12b_pretrain,
        autoregressive_12b_long_finetune,
        autoregressive_13b_video2world_finetune,
        autoregressive_13b_cooldown_finetune,
    ),
}
"""Recipes by the size that is begun with, in the order in which they train."""


def _pretrain(size: Callable[..., Any], latents: str, **config: None) -> run.Partial:
    """A first stage that lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.training import api, defaults

    return run.Partial(
        api.pretrain,
        model=_wfm(run.Config, size, **config),
        data=latent_data(run.Config, latents, patch_spatial=1),
        resume=run.Config(defaults.default_resume),
    )


def finetune(
    size: Callable[..., Any],
    base: str,
    latents: str,
    pictures: str | None = None,
    *,
    may_lack: tuple[str, ...] = (),
    **config: Any,  # noqa: ANN401 - fields of ARConfig
) -> run.Partial:
    """A later stage that lacks `trainer`, `log` and `optim`."""
    model = _wfm(run.Partial, size, **config)
    model.may_lack = may_lack  # of a base that is a file; `finetune` has it of a checkpoint
    data = latent_data(run.Partial, latents, pictures, pictures_per_sample=_PICTURES_PER_SAMPLE, patch_spatial=1)
    return finetune_from(base, model, data, may_lack=may_lack)


def _video2world(
    size: Callable[..., Any],
    base: str,
    latents: str,
    pictures: str | None,
    **config: Any,  # noqa: ANN401 - fields of ARConfig
) -> run.Partial:
    from nemo_cosmos.autoregressive.warm_start import text_layers

    return finetune(size, base, latents, pictures, may_lack=text_layers(size().num_layers), **config)


def _wfm(kind: type, size: Callable[..., Any], **config: Any) -> run.Config | run.Partial:  # noqa: ANN401 - fields of ARConfig
    """A model as `run.Config`, or as `run.Partial` for later stages, which make it once the base has been found."""
    from nemo_cosmos.autoregressive.step import AutoregressiveModel, NextTokenConfig

    return kind(
        AutoregressiveModel,
        config=run.Config(size, **config),
        objective=run.Config(NextTokenConfig, num_condition_latents_t=1, z_loss_coeff=3e-4),
    )


def tiny_yarn() -> run.Config:
    """How the tiny size goes on to longer videos."""
    from nemo_cosmos.autoregressive.config import Yarn

    return run.Config(Yarn, original_grid=TINY_GRID)


def at_tiny_size(recipe: run.Partial, directory: str, max_steps: int, *, decay: Decay = "constant") -> run.Partial:
    """What the stages of the tiny size share."""
    from nemo_cosmos.training import defaults

    recipe.data.micro_batch_size = recipe.data.global_batch_size = 8
    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    # The cool-down begins at the rate at which the stage before it ended.
    warmup = 0 if decay == "linear" else min(200, max_steps // 10)
    recipe.optim = _adam(lr=1e-3, max_steps=max_steps, warmup=warmup, decay=decay)
    return recipe


def at_published_size(
    recipe: run.Partial, directory: str, max_steps: int, num_nodes: int, *, tp: int, decay: Decay = "constant"
) -> run.Partial:
    """What the published sizes share."""
    from nemo_cosmos.training import defaults

    recipe.data.micro_batch_size, recipe.data.num_workers = 1, 4
    recipe.data.global_batch_size = 4 * data_parallel(num_nodes, tp=tp, cp=1)
    recipe.trainer = run.Config(
        defaults.default_trainer,
        max_steps=max_steps,
        devices=GPUS_PER_NODE,
        num_nodes=num_nodes,
        tp=tp,
        sp=True,
        async_save=True,
    )
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=1000)
    warmup = 0 if decay == "linear" else min(_WARMUP, max_steps // 2)
    recipe.optim = _adam(lr=1e-3, max_steps=max_steps, warmup=warmup, decay=decay)
    return recipe


def _adam(*, lr: float, max_steps: int, warmup: int, decay: Decay) -> run.Config:
    """AdamW with the published betas (PyTorch's own) and weight decay."""
    from nemo_cosmos.training.defaults import default_optim

    return run.Config(
        default_optim,
        lr=lr,
        max_steps=max_steps,
        warmup=warmup,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        decay=decay,
    )
