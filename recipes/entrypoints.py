"""What `nemo cosmos NAME` runs: one entry point per kind of step.

`nemo` imports this file at every start, whatever it was called for, so nothing here imports a framework before a
function is called. An entry point without a recipe of its own name is told one by `--factory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle
import nemo_run as run

from recipes import executors
from recipes.entrypoint_help import CosmosEntrypoint
from recipes.registry import FINETUNE, PRETRAIN, STEPS

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from nemo.lightning import AutoResume, NeMoLogger, Trainer
    from nemo.lightning.pytorch.optim import OptimizerModule

__all__ = ["executors", "finetune", "pretrain"]

NAMESPACE = "cosmos"


@run.cli.entrypoint(namespace=NAMESPACE, entrypoint_cls=CosmosEntrypoint)
def pretrain(
    model: LightningModule,
    data: LightningDataModule,
    trainer: Trainer,
    log: NeMoLogger,
    optim: OptimizerModule,
    resume: AutoResume | None = None,
) -> Path:
    """Trains a tokenizer or a WFM from scratch; name a recipe: `--factory diffusion_tiny_pretrain`."""
    from nemo_cosmos.training.api import pretrain as target

    return target(model, data, trainer, log=log, optim=optim, resume=resume)


@run.cli.entrypoint(namespace=NAMESPACE, entrypoint_cls=CosmosEntrypoint)
def finetune(
    model: Callable[..., LightningModule],
    data: Callable[..., LightningDataModule],
    trainer: Trainer,
    log: NeMoLogger,
    optim: OptimizerModule,
    base: str,
    resume: AutoResume | None = None,
    may_lack: tuple[str, ...] = (),
) -> Path:
    """Post-trains a WFM or a tokenizer from another; name a recipe: `--factory diffusion_tiny_action_finetune`."""
    from nemo_cosmos.post_training.start import finetune as target

    return target(model, data, trainer, log=log, optim=optim, base=base, resume=resume, may_lack=may_lack)


def _entry_point_of(recipe: Callable[..., run.Partial]) -> None:
    """Registers a recipe's step under the recipe's name, with the recipe as what it runs unless told otherwise."""

    def run_step(**arguments: Any) -> Any:  # noqa: ANN401 - as the step's own
        return fiddle.build(recipe(**arguments))()

    run_step.__name__, run_step.__doc__ = recipe.__name__, recipe.__doc__
    run.cli.entrypoint(run_step, namespace=NAMESPACE, default_factory=recipe, entrypoint_cls=CosmosEntrypoint)
    run_step.cli_entrypoint.recipes = (recipe,)  # type: ignore[attr-defined]


def _register() -> None:
    for recipes, target in ((PRETRAIN, pretrain), (FINETUNE, finetune)):
        target.cli_entrypoint.recipes = tuple(recipes.values())
        for recipe in recipes.values():
            run.cli.factory(recipe, target=target)
    for recipe in STEPS.values():
        _entry_point_of(recipe)


_register()
