"""Recipes that train video tokenizers, in three stages; those of images stand in `recipes.image_tokenizer`.

1. pretrain: L1 and a perceptual distance.
2. flow_finetune: optical flow and Gram matrices with them.
3. adversarial_finetune: a discriminator with these.

Source of weights and optimizer: cosmos-predict1, `tokenizer/training`; of the stages: arXiv 2501.03575 section 4.2.
Neither gives a discriminator: its sizes, its weight and the lengths of the later stages are ours.
"""

from __future__ import annotations

import nemo_run as run

from recipes import tokenizer_parts as parts
from recipes.annotations import with_types

ARCHITECTURE_TINY, ARCHITECTURE_TINY_DISCRETE, ARCHITECTURE_720P = "CV8x8x8-tiny", "DV8x8x8-tiny", "CV8x8x8-720p"


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
        init_from: `default` starts from the embedded weights, any place that holds a tokenizer from those; None from
            scratch.
    """
    recipe = _tiny_pretrain(ARCHITECTURE_TINY, curated, directory, max_steps)
    recipe.model.config.init_from = init_from
    return recipe


@with_types
def tokenizer_tiny_discrete_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_tiny_discrete",
    max_steps: int = 4000,
    init_from: str | None = None,
) -> run.Partial:
    """A DV8x8x8 tokenizer of 4,096 codes small enough for a CPU, on 17-frame windows of 128x128.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        init_from: Any place that holds such a tokenizer; None from scratch.
    """
    recipe = _tiny_pretrain(ARCHITECTURE_TINY_DISCRETE, curated, directory, max_steps)
    recipe.model.config.init_from = init_from
    return recipe


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
    return parts.small_run(
        parts.post_training(_second_stage(ARCHITECTURE_TINY), _joint(curated), base), directory, max_steps
    )


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
    model.adversary = parts.adversary(channels=16, start=max_steps // 5, warmup=min(50, max_steps // 10))
    return parts.small_run(parts.post_training(model, _joint(curated), base), directory, max_steps)


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
    from nemo_cosmos.training import api

    perceptual = parts.vgg("auto", num_frames=16)
    model = parts.tokenizer_model(run.Config, ARCHITECTURE_720P, perceptual, **parts.published_weights())
    data = _crops(run.Config, curated, num_nodes)
    return parts.published_run(run.Partial(api.pretrain, model=model, data=data), directory, max_steps, num_nodes)


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
    recipe = parts.post_training(model, _crops(run.Partial, curated, num_nodes), base)
    return parts.published_run(recipe, directory, max_steps, num_nodes)


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
    model.adversary = parts.adversary(
        channels=64, start=min(10_000, max_steps // 5), warmup=parts.published_warmup(max_steps)
    )
    recipe = parts.post_training(model, _crops(run.Partial, curated, num_nodes), base)
    return parts.published_run(recipe, directory, max_steps, num_nodes)


def _tiny_pretrain(architecture: str, curated: str, directory: str, max_steps: int) -> run.Partial:
    from nemo_cosmos.evaluation.perceptual import LpipsLike
    from nemo_cosmos.tokenizer.perceptual import SparsePerceptual
    from nemo_cosmos.training import api

    perceptual = run.Config(SparsePerceptual, distance=run.Config(LpipsLike), num_frames=1)
    model = parts.tokenizer_model(run.Config, architecture, perceptual, perceptual_weight=0.3, ssim_weight=0.15)
    return parts.small_run(
        run.Partial(api.pretrain, model=model, data=parts.clips(run.Config, curated)), directory, max_steps
    )


def _second_stage(
    architecture: str, *, features: str = "hed", flow: str = "lucas_kanade", perceptual_frames: int = 1
) -> run.Partial:
    """L1, VGG features, their Gram matrices and optical flow, with the weights that are published for the end."""
    from nemo_cosmos.tokenizer.optical_flow import optical_flow

    perceptual = parts.vgg(features, num_frames=perceptual_frames)
    model = parts.tokenizer_model(
        run.Partial, architecture, perceptual, perceptual_weight=0.073, gram_weight=0.062, flow_weight=0.01
    )
    model.flow = run.Config(optical_flow, flow)
    return model


def _joint(curated: str) -> run.Partial:
    return parts.clips(run.Partial, curated, pictures_every=2, pictures_per_sample=2)


def _crops(kind: type, curated: str, num_nodes: int) -> run.Config | run.Partial:
    return parts.clips(
        kind,
        curated,
        num_frames=121,
        height=256,
        width=256,
        crop_from=720,
        pictures_every=2,
        pictures_per_sample=16,
        micro_batch_size=1,
        global_batch_size=parts.GPUS_PER_NODE * num_nodes,
        num_workers=4,
    )
