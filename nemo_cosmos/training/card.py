"""`card.json` in every checkpoint: what it is, of what data, and what it takes to use it.

A LightningModule and a LightningDataModule may say what they know by a method `card_fields()`, which gives fields of
`nemo_cosmos.contracts.CheckpointCard`; a model should give `model` (its preset's name) and `config` (its architecture),
a data module `data`, and for latents `tokenizer_fingerprint`, `latent_mean` and `latent_std`.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.files import write_json

CARD = "card.json"
_PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "nemo_cosmos")


class CardWriter(pl.Callback):
    """Writes the card of each checkpoint.

    Args:
        parent: Path of the checkpoint that this run post-trains.
    """

    def __init__(self, *, parent: str | None = None) -> None:
        self._parent = parent

    def write_beside_checkpoint(self, trainer: pl.Trainer, directory: Path) -> None:
        """Called by the strategy while the checkpoint still counts as unfinished."""
        if trainer.is_global_zero:
            write_json(directory / CARD, self.card(trainer).to_dict())

    def card(self, trainer: pl.Trainer) -> CheckpointCard:
        """Puts together what trainer, model and data know."""
        model, data = trainer.lightning_module, trainer.datamodule
        known = {
            "model": type(model).__name__,
            "config": _plain_fields(model.config),
            "data": type(data).__name__,
            "step": trainer.global_step,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "figures": _figures(trainer),
            "parent": self._parent,
            "versions": _versions(),
        }
        for source in (data, model):
            if hasattr(source, "card_fields"):
                known |= source.card_fields()
        return CheckpointCard(**known)


def _plain_fields(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """The fields of a configuration that are not at their defaults and that JSON can hold."""
    values = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
    }
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def _figures(trainer: pl.Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name: float(metrics[name]) for name in ("reduced_train_loss", "val_loss") if name in metrics}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
