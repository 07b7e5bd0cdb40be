"""The recipe of each step, at the quickstart's size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cosmos.checkpoints.embedded import embedded_path
from nemo_cosmos.parallel.device import fast_precision
from nemo_cosmos.quickstart.config import QuickstartConfig
from nemo_cosmos.quickstart.inputs import write_generation_inputs
from recipes import registry

if TYPE_CHECKING:
    import nemo_run as run

TOKENIZER, BASE, ACTION = "tokenizer_tiny", "diffusion_tiny_text2world", "diffusion_tiny_action"
"""Names of the embedded weights."""

_WARM_LR = 3e-5
"""Peak rate of runs that start from trained weights."""


def collect(config: QuickstartConfig) -> run.Partial:
    """Packaged clips, or the user's own, and simulator rollouts."""
    budget = config.budget
    recipe = registry.find("collect")(output_dir=str(config.output / "raw"))
    recipe.videos = config.videos
    recipe.config.num_street, recipe.config.num_arm = budget.num_street, budget.num_arm
    recipe.config.num_heldout_street = recipe.config.num_heldout_arm = budget.num_heldout
    recipe.config.num_multiview = budget.num_multiview
    # The embedded weights were trained on rollouts from seed 0 on; a warm run shows them others.
    recipe.config.seed = config.seed if config.from_scratch else config.seed + 10_000
    recipe.config.workers = config.workers
    return recipe


def curate(config: QuickstartConfig) -> run.Partial:
    """Shots, filters, captions, deduplication, shards, report."""
    recipe = registry.find("curate")(input_dir=str(config.output / "raw"), output_dir=str(config.output / "curated"))
    # No single film, such as the longest packaged one, shall outweigh the rollouts.
    recipe.config.max_clips_per_video = 24
    return recipe


def train_tokenizer(config: QuickstartConfig) -> run.Partial:
    """From scratch all of it; warm the decoder alone, so that the latents of the embedded WFMs stay what they are."""
    recipe = registry.find("tokenizer_tiny_pretrain")(
        curated=str(config.output / "curated"),
        directory=str(config.output / "tokenizer"),
        max_steps=config.budget.tokenizer_steps,
        init_from=None if config.from_scratch else "default",
    )
    recipe.trainer.precision = fast_precision()
    if not config.from_scratch:
        recipe.model.config.freeze_encoder = True
        recipe.optim.lr = _WARM_LR
    return recipe


def evaluate_tokenizer(config: QuickstartConfig) -> run.Partial:
    """On held-out clips, beside bicubic and DCT coding."""
    recipe = registry.find("evaluate_tokenizer")(
        data=str(config.output / "curated"),
        output=str(config.output / "tokenizer_evaluation"),
        tokenizer=str(tokenizer_checkpoint(config)),
    )
    recipe.fast = True
    return recipe


def tokenize(config: QuickstartConfig) -> run.Partial:
    """The latent cache, by the tokenizer just trained."""
    return registry.find("tokenize")(
        curated=str(config.output / "curated"),
        output=str(config.output / "latents"),
        tokenizer=str(tokenizer_checkpoint(config)),
    )


def pretrain(config: QuickstartConfig) -> run.Partial:
    """Text2World."""
    recipe = registry.find("diffusion_tiny_pretrain")(
        latents=str(config.output / "latents"),
        directory=str(config.output / "pretrain"),
        max_steps=config.budget.pretrain_steps,
    )
    recipe.trainer.precision = fast_precision()
    if not config.from_scratch:
        weights = embedded_path(BASE)
        recipe.model.init_from = str(weights)
        recipe.data.statistics_of = str(weights.with_suffix(".json"))
        recipe.optim.lr = _WARM_LR
    return recipe


def finetune(config: QuickstartConfig) -> run.Partial:
    """Video2World with actions; from scratch on the WFM just pretrained, warm on the embedded post-trained one."""
    base = str(newest_checkpoint(config.output / "pretrain")) if config.from_scratch else ACTION
    recipe = registry.find("diffusion_tiny_action_finetune")(
        latents=str(config.output / "latents"),
        base=base,
        directory=str(config.output / "finetune"),
        max_steps=config.budget.finetune_steps,
    )
    recipe.trainer.precision = fast_precision()
    if not config.from_scratch:
        recipe.optim.lr = _WARM_LR
    return recipe


def evaluate(config: QuickstartConfig) -> run.Partial:
    """The post-trained WFM on held-out rollouts."""
    recipe = registry.find("evaluate")(curated=str(config.output / "curated"), output=str(config.output / "evaluation"))
    recipe.checkpoint = str(newest_checkpoint(config.output / "finetune"))
    recipe.unconditional = str(newest_checkpoint(config.output / "pretrain"))
    recipe.tokenizer = str(tokenizer_checkpoint(config))
    recipe.num_clips = config.budget.num_eval_clips
    return recipe


def generate(config: QuickstartConfig) -> run.Partial:
    """One guarded video, from the first frame and the actions of a held-out drive."""
    inputs = write_generation_inputs(config.output / "curated", config.output / "generated")
    recipe = registry.find("generate")(output=str(config.output / "generated" / "video.mp4"), prompt=inputs.prompt)
    recipe.checkpoint = str(newest_checkpoint(config.output / "finetune"))
    recipe.tokenizer = str(tokenizer_checkpoint(config))
    recipe.first_frame, recipe.actions = str(inputs.first_frame), str(inputs.actions)
    recipe.sampling.seed = config.seed
    return recipe


def tokenizer_checkpoint(config: QuickstartConfig) -> Path:
    """The tokenizer just trained."""
    return newest_checkpoint(config.output / "tokenizer")


def newest_checkpoint(run_folder: Path) -> Path:
    """The last finished checkpoint of a training run that has ended."""
    from nemo_cosmos.training.checkpoint import finished_checkpoints

    return finished_checkpoints(run_folder / "checkpoints")[-1]
