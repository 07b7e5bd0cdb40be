"""What the recipes of video and of image tokenizers share.

Source of weights and optimizer: cosmos-predict1, `tokenizer/training`. It gives no discriminator: that is ours.
"""

from __future__ import annotations

from typing import Any

import nemo_run as run

GPUS_PER_NODE = 8


def tokenizer_model(kind: type, architecture: str, perceptual: run.Config, **weights: Any) -> run.Config | run.Partial:  # noqa: ANN401 - fields of LossConfig
    """A model as `run.Config`, or as `run.Partial` for post-training, which makes it once the base has been found."""
    from nemo_cosmos.tokenizer.config import preset
    from nemo_cosmos.tokenizer.losses import LossConfig
    from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
    from nemo_cosmos.tokenizer.step import TokenizerModel

    config = run.Config(
        TokenizerModelConfig, architecture=run.Config(preset, architecture), loss=run.Config(LossConfig, **weights)
    )
    return kind(TokenizerModel, config=config, perceptual=perceptual)


def published_weights() -> dict[str, run.Config]:
    """The published schedule, which brings in the Gram matrices after 500,000 steps."""
    from nemo_cosmos.tokenizer.losses import WeightSchedule

    return {
        "perceptual_weight": run.Config(WeightSchedule, values=(0.1, 0.073), boundaries=(500_000,)),
        "gram_weight": run.Config(WeightSchedule, values=(0.0, 0.062), boundaries=(500_000,)),
    }


def vgg(weights: str, *, num_frames: int) -> run.Config:
    """The published perceptual distance, on frames that are drawn anew in each step; the published one sees all."""
    from nemo_cosmos.evaluation.vgg import Vgg16
    from nemo_cosmos.tokenizer.perceptual import VggPerceptual

    return run.Config(VggPerceptual, features=run.Config(Vgg16, weights), num_frames=num_frames)


def adversary(*, channels: int, start: int, warmup: int) -> run.Config:
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


def clips(kind: type, curated: str, **settings: Any) -> run.Config | run.Partial:  # noqa: ANN401 - of VideoClipDataModule
    """Windows of curated clips; 17 frames of 128x128, four at a time, where nothing else is said."""
    from nemo_cosmos.data.datamodule import VideoClipDataModule

    sizes = {"num_frames": 17, "height": 128, "width": 128, "micro_batch_size": 4, "global_batch_size": 4}
    return kind(VideoClipDataModule, path=curated, **{**sizes, **settings})


def post_training(model: run.Partial, data: run.Partial, base: str) -> run.Partial:
    """A later stage that lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.post_training.start import finetune

    return run.Partial(finetune, model=model, data=data, base=base)


def small_run(recipe: run.Partial, directory: str, max_steps: int) -> run.Partial:
    """What the stages of tokenizers for a CPU share."""
    from nemo_cosmos.training import defaults

    recipe.trainer = run.Config(defaults.default_trainer, max_steps=max_steps)
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=200)
    recipe.optim = adam(lr=2e-4, max_steps=max_steps, warmup=min(200, max_steps // 10))
    recipe.resume = run.Config(defaults.default_resume)
    return recipe


def published_run(recipe: run.Partial, directory: str, max_steps: int, num_nodes: int) -> run.Partial:
    """What the stages of tokenizers of the published sizes share."""
    from nemo_cosmos.training import defaults

    config = recipe.model.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    recipe.trainer = run.Config(
        defaults.default_trainer, max_steps=max_steps, devices=GPUS_PER_NODE, num_nodes=num_nodes, ema_decay=0.9999
    )
    recipe.log = run.Config(defaults.default_log, directory=directory, save_every=5000)
    recipe.optim = adam(lr=1e-4, max_steps=max_steps, warmup=published_warmup(max_steps))
    recipe.resume = run.Config(defaults.default_resume)
    return recipe


def published_warmup(max_steps: int) -> int:
    """5,000 steps as published; half of a run that is too short for them."""
    return min(5000, max_steps // 2)


def adam(*, lr: float, max_steps: int, warmup: int) -> run.Config:
    """Adam with the published beta1 and weight decay."""
    from nemo_cosmos.training.defaults import default_optim

    return run.Config(default_optim, lr=lr, max_steps=max_steps, warmup=warmup, betas=(0.5, 0.999))
