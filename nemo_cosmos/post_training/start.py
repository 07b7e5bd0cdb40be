"""Post-training from a base that is found when the run starts, on the machine that it runs on.

A recipe is made on one machine and run on others, so it carries what the user said of the base: a name, or a path as
the run will see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from nemo.lightning import AutoResume, NeMoLogger, Trainer
from nemo.lightning.pytorch.optim import OptimizerModule

from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stored_weights import is_nemo
from nemo_cosmos.tokenizer.load import is_tokenizer
from nemo_cosmos.training import api
from nemo_cosmos.training.card import CARD
from nemo_cosmos.training.checkpoint import CosmosAutoResume, finished_checkpoints


@dataclass(frozen=True, kw_only=True)
class Base:
    """A WFM or tokenizer to start from."""

    weights: Path
    """A checkpoint folder, a safetensors file of whole weights, or a tokenizer's folder of another format."""
    card: Path

    @property
    def is_checkpoint(self) -> bool:
        """Whether Megatron reads the weights, and not the model itself (`init_from`)."""
        return is_nemo(self.weights)


def find_base(base: str) -> Base:
    """Finds a WFM or tokenizer to start from.

    Args:
        base: A checkpoint folder; a run's folder, of which the newest finished checkpoint is taken; a safetensors file
            of whole weights with its card beside it; or, of a tokenizer, its published, diffusers or own folder; named
            as `find_checkpoint` takes it.

    Raises:
        UserError: There is none, or it is in another format.
    """
    place = find_checkpoint(base)
    if place.suffix == ".safetensors":
        return Base(weights=place, card=place.with_suffix(".json"))
    if (place / "checkpoints").is_dir():
        finished = finished_checkpoints(place / "checkpoints")
        if not finished:
            raise UserError(f"{place}: holds no finished checkpoint. Let that run write one, or give another base.")
        place = finished[-1]
    if (found := detect(place)) is not Format.NEMO and not is_tokenizer(place):
        raise UserError(f"{place}: is {found.value}. Convert it first (nemo-cosmos convert ... --to nemo).")
    return Base(weights=place, card=place / CARD)


def finetune(
    model: Callable[..., LightningModule],
    data: Callable[..., LightningDataModule],
    trainer: Trainer,
    *,
    log: NeMoLogger,
    optim: OptimizerModule,
    base: str,
    resume: AutoResume | None = None,
    may_lack: tuple[str, ...] = (),
) -> Path:
    """Trains a WFM on from a base, on latents that are normalised as the base's were; or a tokenizer, on clips.

    Args:
        model: Makes the model; takes `init_from`, as `DiffusionModel` does, where a base may be a file; or `base`,
            where it reads files and checkpoints by itself.
        data: Makes the data; takes `statistics_of`, as `LatentDataModule` does, where it holds latents.
        trainer: As for `nemo_cosmos.training.api.finetune`, and so all others that are not told here.
        log: Where to write.
        optim: Optimizer and schedule.
        base: See `find_base`; an interrupted run goes on without it.
        resume: Where to go on.
        may_lack: Prefixes of weights that a base's checkpoint may lack.

    Returns:
        The run's folder.

    Raises:
        UserError: There is no such base, or it does not fit the model or the data.
    """
    may_go_on = isinstance(resume, CosmosAutoResume) and log.explicit_log_dir is not None
    resumed = resume.checkpoint_in(log.explicit_log_dir) if may_go_on else None
    if resumed is not None:
        # Its checkpoint has all that the base gave: weights, latent statistics and the base's name.
        found = Base(weights=resumed, card=resumed / CARD)
        parent = CheckpointCard.from_dict(read_json(found.card)).parent
    else:
        found = find_base(base)
        parent = str(found.weights)
    made = model() if resumed is not None else _made(model, found)
    return api.finetune(
        made,
        data(statistics_of=str(found.card)) if _takes(data, "statistics_of") else data(),
        trainer,
        log=log,
        optim=optim,
        resume=resume,
        base=parent if found.is_checkpoint and getattr(made, "init_from", None) is None else None,
        may_lack=may_lack,
    )


def _made(model: Callable[..., LightningModule], base: Base) -> LightningModule:
    """A model that reads the base by itself while it is built; of a checkpoint, none, for Megatron reads that later."""
    if _takes(model, "base"):
        return model(base=str(base.weights))
    if base.is_checkpoint:
        return model()
    if not _takes(model, "init_from"):
        expected = "a checkpoint or a run's folder"
        raise user_error("base", str(base.weights), expected, "This model starts from no other file.")
    return model(init_from=str(base.weights))


def _takes(make: Callable, argument: str) -> bool:
    return argument in inspect.signature(make).parameters
