"""All recipes by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_cosmos.errors import user_error
from recipes import (
    autoregressive,
    autoregressive_action,
    diffusion,
    diffusion_decoder,
    diffusion_stages,
    image_tokenizer,
    medusa,
    post_training,
    steps,
    tokenizer,
)

if TYPE_CHECKING:
    import nemo_run as run

PRETRAIN: dict[str, Callable[..., run.Partial]] = {
    "tokenizer_tiny_pretrain": tokenizer.tokenizer_tiny_pretrain,
    "tokenizer_tiny_discrete_pretrain": tokenizer.tokenizer_tiny_discrete_pretrain,
    "tokenizer_cv8x8x8_720p_pretrain": tokenizer.tokenizer_cv8x8x8_720p_pretrain,
    "tokenizer_ci8x8_tiny_pretrain": image_tokenizer.tokenizer_ci8x8_tiny_pretrain,
    "tokenizer_di8x8_tiny_pretrain": image_tokenizer.tokenizer_di8x8_tiny_pretrain,
    "tokenizer_ci8x8_360p_pretrain": image_tokenizer.tokenizer_ci8x8_360p_pretrain,
    "tokenizer_di8x8_360p_pretrain": image_tokenizer.tokenizer_di8x8_360p_pretrain,
    "diffusion_tiny_pretrain": diffusion.diffusion_tiny_pretrain,
    "diffusion_7b_pretrain": diffusion.diffusion_7b_pretrain,
    "diffusion_14b_pretrain": diffusion.diffusion_14b_pretrain,
    "diffusion_tiny_packed_pretrain": diffusion.diffusion_tiny_packed_pretrain,
    "diffusion_7b_packed_pretrain": diffusion.diffusion_7b_packed_pretrain,
    **{stages[0].__name__: stages[0] for stages in autoregressive.STAGES.values()},
}
"""Run by `nemo cosmos pretrain --factory NAME`."""

FINETUNE: dict[str, Callable[..., run.Partial]] = {
    "tokenizer_tiny_flow_finetune": tokenizer.tokenizer_tiny_flow_finetune,
    "tokenizer_tiny_adversarial_finetune": tokenizer.tokenizer_tiny_adversarial_finetune,
    "tokenizer_cv8x8x8_720p_flow_finetune": tokenizer.tokenizer_cv8x8x8_720p_flow_finetune,
    "tokenizer_cv8x8x8_720p_adversarial_finetune": tokenizer.tokenizer_cv8x8x8_720p_adversarial_finetune,
    **{recipe.__name__: recipe for stages in diffusion_stages.STAGES.values() for recipe in stages[1:]},
    "tokenizer_ci8x8_tiny_gram_finetune": image_tokenizer.tokenizer_ci8x8_tiny_gram_finetune,
    "tokenizer_ci8x8_tiny_adversarial_finetune": image_tokenizer.tokenizer_ci8x8_tiny_adversarial_finetune,
    "tokenizer_di8x8_tiny_gram_finetune": image_tokenizer.tokenizer_di8x8_tiny_gram_finetune,
    "tokenizer_di8x8_tiny_adversarial_finetune": image_tokenizer.tokenizer_di8x8_tiny_adversarial_finetune,
    "tokenizer_ci8x8_360p_gram_finetune": image_tokenizer.tokenizer_ci8x8_360p_gram_finetune,
    "tokenizer_ci8x8_360p_adversarial_finetune": image_tokenizer.tokenizer_ci8x8_360p_adversarial_finetune,
    "tokenizer_di8x8_360p_gram_finetune": image_tokenizer.tokenizer_di8x8_360p_gram_finetune,
    "tokenizer_di8x8_360p_adversarial_finetune": image_tokenizer.tokenizer_di8x8_360p_adversarial_finetune,
    "diffusion_tiny_action_finetune": post_training.diffusion_tiny_action_finetune,
    "diffusion_7b_action_finetune": post_training.diffusion_7b_action_finetune,
    **{recipe.__name__: recipe for stages in autoregressive.STAGES.values() for recipe in stages[1:]},
    **{recipe.__name__: recipe for recipe in autoregressive_action.RECIPES},
    **{recipe.__name__: recipe for recipe in medusa.RECIPES},
    "diffusion_decoder_tiny_finetune": diffusion_decoder.diffusion_decoder_tiny_finetune,
    "diffusion_decoder_7b_finetune": diffusion_decoder.diffusion_decoder_7b_finetune,
}
"""Run by `nemo cosmos finetune --factory NAME`."""

STEPS: dict[str, Callable[..., run.Partial]] = {
    "collect": steps.collect,
    "curate": steps.curate,
    "curate_part": steps.curate_part,
    "dedup": steps.dedup,
    "tokenize": steps.tokenize,
    "tokenize_part": steps.tokenize_part,
    "generate": steps.generate,
    "evaluate": steps.evaluate,
    "evaluate_tokenizer": steps.evaluate_tokenizer,
}
"""Run by `nemo cosmos NAME`."""

RECIPES: dict[str, Callable[..., run.Partial]] = PRETRAIN | FINETUNE | STEPS


def find(name: str) -> Callable[..., run.Partial]:
    """Returns the recipe function called `name`.

    Raises:
        UserError: There is none.
    """
    if name not in RECIPES:
        raise user_error("recipe", name, f"one of {sorted(RECIPES)}", "See `nemo-cosmos recipes list`.")
    return RECIPES[name]


def describe() -> dict[str, str]:
    """Returns what each recipe makes, in one line."""
    return {name: (inspect.getdoc(recipe) or "").splitlines()[0] for name, recipe in RECIPES.items()}


def as_yaml(name: str) -> str:
    """Returns the whole configuration of a recipe with its default arguments.

    Raises:
        UserError: There is no such recipe.
    """
    from nemo_run.cli.config import ConfigSerializer

    return ConfigSerializer().serialize_yaml(find(name)())
