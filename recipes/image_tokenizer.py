"""Recipes that train image tokenizers, continuous (CI) and discrete (DI), in three stages.

1. pretrain: L1 and a perceptual distance.
2. gram_finetune: Gram matrices with them.
3. adversarial_finetune: a discriminator with these; it is the videos', to which a picture is a video that stands still.

Pictures are single frames of curated clips, of which some may have one frame only. Another compression is an override,
such as `model.config.architecture.name=CI16x16-360p`.

Source of weights and optimizer: cosmos-predict1, `tokenizer/training`, which trains images by the losses of videos and
gives no data for them: picture sizes and batches are ours.
"""

from __future__ import annotations

import nemo_run as run

from recipes import tokenizer_parts as parts
from recipes.annotations import with_types


@with_types
def tokenizer_ci8x8_tiny_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_ci8x8_tiny",
    max_steps: int = 4000,
) -> run.Partial:
    """A CI8x8 tokenizer small enough for a CPU, on pictures of 128x128.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_pretrain("CI8x8-tiny", curated, directory, max_steps)


@with_types
def tokenizer_ci8x8_tiny_gram_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_ci8x8_tiny",
    directory: str = "runs/tokenizer_ci8x8_tiny_gram",
    max_steps: int = 1000,
) -> run.Partial:
    """Second stage of CI8x8-tiny: Gram matrices of the perceptual features.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_finetune("CI8x8-tiny", curated, base, directory, max_steps, adversarial=False)


@with_types
def tokenizer_ci8x8_tiny_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_ci8x8_tiny_gram",
    directory: str = "runs/tokenizer_ci8x8_tiny_adversarial",
    max_steps: int = 500,
) -> run.Partial:
    """Last stage of CI8x8-tiny: the second stage's losses and a discriminator.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_finetune("CI8x8-tiny", curated, base, directory, max_steps, adversarial=True)


@with_types
def tokenizer_di8x8_tiny_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_di8x8_tiny",
    max_steps: int = 4000,
) -> run.Partial:
    """A DI8x8 tokenizer small enough for a CPU, on pictures of 128x128.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_pretrain("DI8x8-tiny", curated, directory, max_steps)


@with_types
def tokenizer_di8x8_tiny_gram_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_di8x8_tiny",
    directory: str = "runs/tokenizer_di8x8_tiny_gram",
    max_steps: int = 1000,
) -> run.Partial:
    """Second stage of DI8x8-tiny: Gram matrices of the perceptual features.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_finetune("DI8x8-tiny", curated, base, directory, max_steps, adversarial=False)


@with_types
def tokenizer_di8x8_tiny_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_di8x8_tiny_gram",
    directory: str = "runs/tokenizer_di8x8_tiny_adversarial",
    max_steps: int = 500,
) -> run.Partial:
    """Last stage of DI8x8-tiny: the second stage's losses and a discriminator.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    return _tiny_finetune("DI8x8-tiny", curated, base, directory, max_steps, adversarial=True)


@with_types
def tokenizer_ci8x8_360p_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_ci8x8_360p",
    max_steps: int = 1_000_000,
    num_nodes: int = 1,
) -> run.Partial:
    """The published CI8x8-360p tokenizer, on crops of 256x256; 8 GPUs a node.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_pretrain("CI8x8-360p", curated, directory, max_steps, num_nodes)


@with_types
def tokenizer_ci8x8_360p_gram_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_ci8x8_360p",
    directory: str = "runs/tokenizer_ci8x8_360p_gram",
    max_steps: int = 500_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Second stage of CI8x8-360p: Gram matrices of the perceptual features.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_finetune("CI8x8-360p", curated, base, directory, max_steps, num_nodes, adversarial=False)


@with_types
def tokenizer_ci8x8_360p_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_ci8x8_360p_gram",
    directory: str = "runs/tokenizer_ci8x8_360p_adversarial",
    max_steps: int = 100_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Last stage of CI8x8-360p: the second stage's losses and a discriminator.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_finetune("CI8x8-360p", curated, base, directory, max_steps, num_nodes, adversarial=True)


@with_types
def tokenizer_di8x8_360p_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_di8x8_360p",
    max_steps: int = 1_000_000,
    num_nodes: int = 1,
) -> run.Partial:
    """The published DI8x8-360p tokenizer, on crops of 256x256; 8 GPUs a node.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_pretrain("DI8x8-360p", curated, directory, max_steps, num_nodes)


@with_types
def tokenizer_di8x8_360p_gram_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_di8x8_360p",
    directory: str = "runs/tokenizer_di8x8_360p_gram",
    max_steps: int = 500_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Second stage of DI8x8-360p: Gram matrices of the perceptual features.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The first stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_finetune("DI8x8-360p", curated, base, directory, max_steps, num_nodes, adversarial=False)


@with_types
def tokenizer_di8x8_360p_adversarial_finetune(
    curated: str = "runs/curated",
    base: str = "runs/tokenizer_di8x8_360p_gram",
    directory: str = "runs/tokenizer_di8x8_360p_adversarial",
    max_steps: int = 100_000,
    num_nodes: int = 1,
) -> run.Partial:
    """Last stage of DI8x8-360p: the second stage's losses and a discriminator.

    Args:
        curated: Folder that the `curate` recipe wrote.
        base: The second stage's run or checkpoint: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    return _published_finetune("DI8x8-360p", curated, base, directory, max_steps, num_nodes, adversarial=True)


def _tiny_pretrain(architecture: str, curated: str, directory: str, max_steps: int) -> run.Partial:
    from nemo_cosmos.evaluation.perceptual import LpipsLike
    from nemo_cosmos.tokenizer.perceptual import SparsePerceptual
    from nemo_cosmos.training import api

    perceptual = run.Config(SparsePerceptual, distance=run.Config(LpipsLike))
    model = parts.tokenizer_model(run.Config, architecture, perceptual, perceptual_weight=0.3)
    recipe = run.Partial(api.pretrain, model=model, data=_pictures(run.Config, curated))
    return parts.small_run(recipe, directory, max_steps)


def _tiny_finetune(
    architecture: str, curated: str, base: str, directory: str, max_steps: int, *, adversarial: bool
) -> run.Partial:
    model = _second_stage(architecture, features="hed")
    if adversarial:
        model.adversary = parts.adversary(channels=16, start=max_steps // 5, warmup=min(50, max_steps // 10))
    recipe = parts.post_training(model, _pictures(run.Partial, curated), base)
    return parts.small_run(recipe, directory, max_steps)


def _published_pretrain(architecture: str, curated: str, directory: str, max_steps: int, num_nodes: int) -> run.Partial:
    from nemo_cosmos.training import api

    model = parts.tokenizer_model(
        run.Config, architecture, parts.vgg("auto", num_frames=1), **parts.published_weights()
    )
    recipe = run.Partial(api.pretrain, model=model, data=_crops(run.Config, curated, num_nodes))
    return parts.published_run(recipe, directory, max_steps, num_nodes)


def _published_finetune(
    architecture: str,
    curated: str,
    base: str,
    directory: str,
    max_steps: int,
    num_nodes: int,
    *,
    adversarial: bool,
) -> run.Partial:
    model = _second_stage(architecture, features="auto")
    if adversarial:
        model.adversary = parts.adversary(
            channels=64, start=min(10_000, max_steps // 5), warmup=parts.published_warmup(max_steps)
        )
    recipe = parts.post_training(model, _crops(run.Partial, curated, num_nodes), base)
    return parts.published_run(recipe, directory, max_steps, num_nodes)


def _second_stage(architecture: str, *, features: str) -> run.Partial:
    """L1, VGG features and their Gram matrices, with the weights that are published for the end."""
    perceptual = parts.vgg(features, num_frames=1)
    return parts.tokenizer_model(run.Partial, architecture, perceptual, perceptual_weight=0.073, gram_weight=0.062)


def _pictures(kind: type, curated: str) -> run.Config | run.Partial:
    return parts.clips(kind, curated, num_frames=1, micro_batch_size=16, global_batch_size=16)


def _crops(kind: type, curated: str, num_nodes: int) -> run.Config | run.Partial:
    return parts.clips(
        kind,
        curated,
        num_frames=1,
        height=256,
        width=256,
        crop_from=360,
        micro_batch_size=16,
        global_batch_size=16 * parts.GPUS_PER_NODE * num_nodes,
        num_workers=4,
    )
