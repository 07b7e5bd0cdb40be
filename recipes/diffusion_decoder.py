"""Recipes that make a diffusion decoder of a diffusion WFM, for the tokens of an autoregressive one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from recipes.annotations import with_types
from recipes.diffusion import CP_512P
from recipes.post_training import at_published_size, at_tiny_size, finetune_from


@with_types
def diffusion_decoder_tiny_finetune(
    latents: str = "runs/latents",
    tokens: str = "runs/tokens",
    base: str = "diffusion_tiny_text2world",
    directory: str = "runs/diffusion_decoder_tiny",
    max_steps: int = 4000,
) -> run.Partial:
    """From the tokens of DV8x8x8-tiny to the latents of CV8x8x8-tiny, on a CPU.

    Args:
        latents: Folder that the `tokenize` recipe wrote with the continuous tokenizer.
        tokens: The same with the discrete one, of the same curated clips.
        base: The diffusion WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
    """
    from nemo_cosmos.autoregressive.diffusion_decoder.config import diffusion_decoder_tiny
    from nemo_cosmos.autoregressive.diffusion_decoder.pixel_loss import PixelLoss
    from nemo_cosmos.evaluation.perceptual import LpipsLike
    from nemo_cosmos.tokenizer.losses import LossConfig
    from nemo_cosmos.tokenizer.perceptual import SparsePerceptual

    recipe = _finetune(diffusion_decoder_tiny, latents, tokens, base)
    # Most of what tokens tell has to be learnt where the noise hides the rest.
    recipe.model.edm.p_mean, recipe.model.edm.p_std, recipe.model.edm.adjust_video_noise = 1.5, 1.0, False
    perceptual = run.Config(SparsePerceptual, distance=run.Config(LpipsLike), num_frames=1)
    terms = run.Config(LossConfig, perceptual_weight=0.3, ssim_weight=0.15)
    recipe.model.pixel_loss = run.Config(PixelLoss, loss=terms, perceptual=perceptual)
    return at_tiny_size(recipe, directory, max_steps, lr=1e-3, warmup=100)


@with_types
def diffusion_decoder_7b_finetune(
    latents: str = "runs/latents",
    tokens: str = "runs/tokens",
    base: str = "runs/diffusion_7b",
    directory: str = "runs/diffusion_decoder_7b",
    max_steps: int = 20_000,
    num_nodes: int = 8,
) -> run.Partial:
    """From the tokens of DV8x16x16 to the latents of CV8x8x8 by the published 7B: 57 frames; TP4 with SP, CP2.

    Args:
        latents: Folder that the `tokenize` recipe wrote with Cosmos-Tokenize1-CV8x8x8-720p and T5.
        tokens: The same with Cosmos-Tokenize1-DV8x16x16-720p, of the same curated clips.
        base: The diffusion WFM: see `nemo_cosmos.post_training.start.find_base`.
        directory: The run's folder; the same one again goes on there.
        max_steps: Optimizer steps, and the length of the learning-rate schedule.
        num_nodes: Of 8 GPUs; the batch grows with them.
    """
    from nemo_cosmos.autoregressive.diffusion_decoder.config import diffusion_decoder_7b

    recipe = _finetune(diffusion_decoder_7b, latents, tokens, base)
    return at_published_size(recipe, directory, max_steps, num_nodes, tp=4, cp=CP_512P, weight_decay=0.1)


def _finetune(size: Callable[..., Any], latents: str, tokens: str, base: str) -> run.Partial:
    """What the sizes share; lacks `trainer`, `log` and `optim`."""
    from nemo_cosmos.data.datamodule import PairedLatentDataModule
    from nemo_cosmos.diffusion.objective import EDM
    from nemo_cosmos.post_training.diffusion_decoder import diffusion_decoder

    model = run.Partial(diffusion_decoder, config=run.Config(size), edm=run.Config(EDM))
    return finetune_from(base, model, run.Partial(PairedLatentDataModule, path=latents, tokens=tokens))
