"""Recipes that train tokenizers, in three stages.

1. pretrain: L1 and a perceptual distance.
2. flow_finetune: optical flow and Gram matrices with them.
3. adversarial_finetune: a discriminator with these.

Source of weights and optimizer: cosmos-predict1, `tokenizer/training`; of the stages: arXiv 2501.03575 section 4.2.
Neither gives a discriminator: its sizes, its weight and the lengths of the later stages are ours.
"""

from __future__ import annotations

from typing import Any

import nemo_run as run

from recipes.annotations import with_types

ARCHITECTURE_TINY, ARCHITECTURE_720P = "CV8x8x8-tiny", "CV8x8x8-720p"


@with_types
def tokenizer_tiny_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_tiny",
    max_steps: int = 4000,
    init_from: str | None = None,
) -> run.Partial:
    """A CV8x8x8 tokenizer small enough for a CPU, on 17-frame windows of 128x128.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        init_from: `default` starts from the embedded weights, a tokenizer folder or a `.safetensors` with its card from
            those; None from scratch.
    """
    from nemo_cosmos.evaluation.perceptual import LpipsLike
    from nemo_cosmos.tokenizer.perceptual import SparsePerceptual
    from nemo_cosmos.training import api

    perceptual = run.Config(SparsePerceptual, distance=run.Config(LpipsLike), num_frames=1)
    model = _model(run.Config, ARCHITECTURE_TINY, perceptual, perceptual_weight=0.3)
    model.config.init_from = init_from
    return _tiny(run.Partial(api.pretrain, model=model, data=_clips(run.Config, curated)), directory, max_steps)


@with_types
def tokenizer_tiny_flow_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_tiny",
    directory: str = "runs/tokenizer_tiny_flow",
    max_steps: int = 1000,
) -> run.Partial:
    """Second stage of the tiny tokenizer: optical flow and Gram matrices; every other batch is of pictures.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny(_finetune(_second_stage(ARCHITECTURE_TINY), _joint(curated), base), directory, max_steps)


@with_types
def tokenizer_tiny_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_tiny_flow",
    directory: str = "runs/tokenizer_tiny_adversarial",
    max_steps: int = 500,
) -> run.Partial:
    """Last stage of the tiny tokenizer: the second stage's losses and a small discriminator.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    model = _second_stage(ARCHITECTURE_TINY)
    model.adversary = _adversary(channels=16, start=max_steps // 5, warmup=min(50, max_steps // 10))
    return _tiny(_finetune(model, _joint(curated), base), directory, max_steps)


@with_types
def tokenizer_cv8x8x8_720p_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_cv8x8x8_720p",
    max_steps: int = 1_000_000,
    num_nodes: int = 1,
) -> run.Partial:
    """The published CV8x8x8-720p tokenizer (105,653,696 parameters), on 121-frame crops of 256x256; 8 GPUs a node.

    The weights are the published ones, which bring in the Gram matrices after 500,000 steps.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.tokenizer.losses import WeightSchedule
    from nemo_cosmos.training import api

    model = _model(
        run.Config,
        ARCHITECTURE_720P,
        _vgg("auto", num_frames=16),
        perceptual_weight=run.Config(WeightSchedule, values=(0.1, 0.073), boundaries=(500_000,)),
        gram_weight=run.Config(WeightSchedule, values=(0.0, 0.062), boundaries=(500_000,)),
    )
    data = _crops(run.Config, curated, num_nodes)
    return _at_720p(run.Partial(api.pretrain, model=model, data=data), directory, max_steps, num_nodes)


@with_types
def tokenizer_cv8x8x8_720p_flow_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_cv8x8x8_720p",
    directory: str = "runs/tokenizer_cv8x8x8_720p_flow",
    max_steps: int = 500_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Second stage of CV8x8x8-720p: optical flow and Gram matrices, at the weights that are published for the end.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    model = _second_stage(ARCHITECTURE_720P, features="auto", flow="auto", perceptual_frames=16)
    recipe = _finetune(model, _crops(run.Partial, curated, num_nodes), base)
    return _at_720p(recipe, directory, max_steps, num_nodes)


@with_types
def tokenizer_cv8x8x8_720p_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_cv8x8x8_720p_flow",
    directory: str = "runs/tokenizer_cv8x8x8_720p_adversarial",
    max_steps: int = 100_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Last stage of CV8x8x8-720p: the second stage's losses and a discriminator of patches in space and time.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    model = _second_stage(ARCHITECTURE_720P, features="auto", flow="auto", perceptual_frames=16)
    model.adversary = _adversary(channels=64, start=min(10_000, max_steps // 5), warmup=_published_warmup(max_steps))
    recipe = _finetune(model, _crops(run.Partial, curated, num_nodes), base)
    return _at_720p(recipe, directory, max_steps, num_nodes)


def _model(kind: type, architecture: str, perceptual: run.Config, **weights: Any) -> run.Config | run.Partial:  # noqa: ANN401 - fields of LossConfig
    """A model as `run.Config`, or as `run.Partial` for post-training, which makes it once the base has been found."""
    from nemo_cosmos.tokenizer.config import preset
    from nemo_cosmos.tokenizer.losses import LossConfig
    from nemo_cosmos.tokenizer.step import TokenizerModel, TokenizerModelConfig

    config = run.Config(
        TokenizerModelConfig, architecture=run.Config(preset, architecture), loss=run.Config(LossConfig, **weights)
    )
    return kind(TokenizerModel, config=config, perceptual=perceptual)


def _second_stage(
    architecture: str, *, features: str = "hed", flow: str = "lucas_kanade", perceptual_frames: int = 1
) -> run.Partial:
    """L1, VGG features, their Gram matrices and optical flow, with the weights that are published for the end."""
    from nemo_cosmos.tokenizer.optical_flow import optical_flow

    perceptual = _vgg(features, num_frames=perceptual_frames)
    model = _model(run.Partial, architecture, perceptual, perceptual_weight=0.073, gram_weight=0.062, flow_weight=0.01)
    model.flow = run.Config(optical_flow, flow)
    return model


def _vgg(weights: str, *, num_frames: int) -> run.Config:
    """The published perceptual distance, on frames that are drawn anew in each step; the published one sees all."""
    from nemo_cosmos.evaluation.vgg import Vgg16
    from nemo_cosmos.tokenizer.perceptual import VggPerceptual

    return run.Config(VggPerceptual, features=run.Config(Vgg16, weights), num_frames=num_frames)


def _adversary(*, channels: int, start: int, warmup: int) -> run.Config:
    """A discriminator that the tokenizer hears of from step `start` on."""
    from nemo_cosmos.tokenizer.adversary import Adversary
    from nemo_cosmos.tokenizer.discriminator import DiscriminatorConfig
    from nemo_cosmos.tokenizer.losses import WeightSchedule

    return run.Config(
        Adversary,
        config=run.Config(DiscriminatorConfig, channels=channels),
        weight=run.Config(WeightSchedule, values=(0.0, 0.05), boundaries=(start,)),
        warmup=warmup,
    )


def _clips(kind: type, curated: str, **settings: Any) -> run.Config | run.Partial:  # noqa: ANN401 - of VideoClipDataModule
    from nemo_cosmos.data.datamodule import VideoClipDataModule

    sizes = {"num_frames": 17, "height": 128, "width": 128, "micro_batch_size": 4, "global_batch_size": 4}
    return kind(VideoClipDataModule, path=curated, **{**sizes, **settings})


def _joint(curated: str) -> run.Partial:
    return _clips(run.Partial, curated, pictures_every=2, pictures_per_sample=2)


def _crops(kind: type, curated: str, num_nodes: int) -> run.Config | run.Partial:
    return _clips(
        kind,
        curated,
        num_frames=121,
        height=256,
        width=256,
        crop_from=720,
        pictures_every=2,
        pictures_per_sample=16,
        micro_batch_size=1,
        global_batch_size=GPUS_PER_NODE * num_nodes,
        num_workers=4,
    )


def _finetune(model: run.Partial, data: run.Partial, base: str) -> run.Partial:
    from nemo_cosmos.post_training.start import finetune

    return run.Partial(finetune, model=model, data=data, base=base)


def _tiny(recipe: run.Partial, directory: str, max_steps: int) -> run.Partial:
    """What the tiny tokenizer's stages share."""
    from nemo_cosmos.training import defaults

    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    recipe.optim = _adam(lr=2e-4, max_steps=max_steps, warmup=min(200, max_steps // 10))
    recipe.resume = run.Config(defaults.default_resume)
    return recipe


GPUS_PER_NODE = 8


def _at_720p(recipe: run.Partial, directory: str, max_steps: int, num_nodes: int) -> run.Partial:
    """What the stages of the published size share."""
    from nemo_cosmos.training import defaults

    config = recipe.model.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    recipe.trainer = run.Config(
        defaults.default_trainer, max_steps=max_steps, devices=GPUS_PER_NODE, num_nodes=num_nodes, ema_decay=0.9999
    )
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=5000)
    recipe.optim = _adam(lr=1e-4, max_steps=max_steps, warmup=_published_warmup(max_steps))
    recipe.resume = run.Config(defaults.default_resume)
    return recipe


def _published_warmup(max_steps: int) -> int:
    """5,000 steps as published; half of a run that is too short for them."""
    return min(5000, max_steps // 2)


def _adam(*, lr: float, max_steps: int, warmup: int) -> run.Config:
    """Adam with the published beta1 and weight decay."""
    from nemo_cosmos.training.defaults import default_optim

    return run.Config(default_optim, lr=lr, max_steps=max_steps, warmup=warmup, betas=(0.5, 0.999))
