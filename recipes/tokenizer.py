"""Recipes that train tokenizers."""

from __future__ import annotations

import nemo_run as run

from recipes.annotations import with_types


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
        init_from: `default` starts from the embedded weights, a folder from those in it; None from scratch.
    """
    from nemo_cosmos.data.datamodule import VideoClipDataModule

    data = run.Config(
        VideoClipDataModule, path=curated, num_frames=17, height=128, width=128, micro_batch_size=4, global_batch_size=4
    )
    return _pretrain(
        "CV8x8x8-tiny",
        data,
        directory,
        max_steps=max_steps,
        lr=2e-4,
        warmup=min(200, max_steps // 10),
        init_from=init_from,
        save_every=200,
        perceptual_weight=0.3,
        perceptual_frames=1,
    )


@with_types
def tokenizer_cv8x8x8_720p_pretrain(
    curated: str = "runs/curated",
    directory: str = "runs/tokenizer_cv8x8x8_720p",
    max_steps: int = 1_000_000,
    num_nodes: int = 1,
) -> run.Partial:
    """The published CV8x8x8-720p tokenizer (105,653,696 parameters), on 49-frame crops of 256x256; 8 GPUs a node.

    Args:
        curated: Folder that the `curate` recipe wrote.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.data.datamodule import VideoClipDataModule

    data = run.Config(
        VideoClipDataModule,
        path=curated,
        num_frames=49,
        height=256,
        width=256,
        micro_batch_size=1,
        global_batch_size=8 * num_nodes,
        num_workers=4,
    )
    recipe = _pretrain(
        "CV8x8x8-720p",
        data,
        directory,
        max_steps=max_steps,
        lr=1e-4,
        warmup=min(5000, max_steps // 2),
        init_from=None,
        save_every=5000,
        perceptual_weight=0.1,
        perceptual_frames=8,
    )
    recipe.trainer.devices, recipe.trainer.num_nodes = 8, num_nodes
    return recipe


def _pretrain(
    architecture: str,
    data: run.Config,
    directory: str,
    *,
    max_steps: int,
    lr: float,
    warmup: int,
    init_from: str | None,
    save_every: int,
    perceptual_weight: float,
    perceptual_frames: int,
) -> run.Partial:
    """The first training stage: L1 and a perceptual distance."""
    from nemo_cosmos.evaluation.perceptual import LpipsLike
    from nemo_cosmos.tokenizer.config import preset
    from nemo_cosmos.tokenizer.losses import LossConfig
    from nemo_cosmos.tokenizer.perceptual import SparsePerceptual
    from nemo_cosmos.tokenizer.step import TokenizerModel, TokenizerModelConfig
    from nemo_cosmos.training import api, defaults

    config = run.Config(
        TokenizerModelConfig,
        architecture=run.Config(preset, architecture),
        loss=run.Config(LossConfig, perceptual_weight=perceptual_weight),
        init_from=init_from,
    )
    perceptual = run.Config(SparsePerceptual, distance=run.Config(LpipsLike), num_frames=perceptual_frames)
    return run.Partial(
        api.pretrain,
        model=run.Config(TokenizerModel, config=config, perceptual=perceptual),
        data=data,
        trainer=run.Config(defaults.default_trainer, max_steps=max_steps),
        log=run.Config(defaults.default_log, directory=directory, save_every=save_every),
        # Adam's beta1 and weight decay are those of the published training.
        optim=run.Config(defaults.default_optim, lr=lr, max_steps=max_steps, warmup=warmup, betas=(0.5, 0.999)),
        resume=run.Config(defaults.default_resume),
    )
