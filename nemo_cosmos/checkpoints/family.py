"""What the families of models whose weights are moved one by one have in common: finding, opening and writing them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.transformer.module import MegatronModule

from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.weight_file import card_without_history, check_weights, file_at, open_file, write_file
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import PREFIX
from nemo_cosmos.tokenizer import published
from nemo_cosmos.weight_files.stored_tensor import Weights

Target = Literal["nemo", "reference", "safetensors"]
"""Formats that every family may have."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model between two formats, or that is not loaded yet."""

    weights: Weights
    """Whole, under our names."""
    card: CheckpointCard
    may_lack: tuple[str, ...] = ()
    """Our names that the source format cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, by what its own modules know of it."""

    name: str
    """As cards call it."""
    presets: Collection[str]
    network: type[MegatronModule]
    is_architecture: Callable[[dict[str, Any]], bool]
    """Tells whether a card's configuration is one of this family."""
    architecture_of: Callable[[Any], dict[str, Any]]
    config_from: Callable[..., Any]
    is_reference: Callable[[Weights], bool]
    """Tells whether weights have this family's names of the reference."""
    config_of_reference: Callable[[Weights, str | None], Any]
    entering: Callable[[Weights, Any], Weights]
    """The reference's weights under our names."""
    leaving: Callable[[Weights, Any], Weights]
    """Our weights under the reference's names."""
    open_file: Callable[[Path], Weights] = open_file

    def lies_at(self, place: Path, preset: str | None) -> bool:
        """Tells whether one of this family lies at a path, or something else.

        Args:
            place: A file or folder of a known format.
            preset: The architecture that the user names, or None.

        Raises:
            UserError: It is broken, or none of the formats.
        """
        found = detect(place)
        if found is Format.NEMO:
            return self.is_architecture(read_json(place / "card.json").get("config", {}))
        file = file_at(place)
        if found in (Format.PIPELINE, Format.DIFFUSERS) or file is None:
            return False
        if preset is not None:
            return preset in self.presets
        if (card := file.with_suffix(".json")).is_file():
            return self.is_architecture(read_json(card).get("config", {}))
        return published.config_told_by(file) is None and self.is_reference(open_file(file))

    def open(self, place: Path, preset: str | None = None) -> StoredModel:
        """Opens a model whose weights are exactly those of its architecture.

        Args:
            place: A NeMo checkpoint with its card; a `.pt` or `.safetensors` file under the reference's names, or a
                published folder with a `model.pt`; or a `.safetensors` file under ours with its card beside it. A card
                beside a file, as conversion writes it, tells the architecture.
            preset: A name of `presets`, for reference weights that are no published model's and come without a card.

        Raises:
            UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
        """
        found = detect(place)
        if found is Format.NEMO:
            card = CheckpointCard.from_dict(read_json(place / "card.json"))
            stored = StoredModel(weights=nemo_format.open_weights(place), card=card)
        elif (file := file_at(place)) is not None:
            stored = self._open_file(file, preset)
        else:
            raise UserError(f"{place}: is {found.value}, from which no {self.name} model is read. Check the path.")
        self.check(stored, place)
        return stored

    def _open_file(self, file: Path, preset: str | None) -> StoredModel:
        weights, card = self.open_file(file), None
        if preset is None and (beside := file.with_suffix(".json")).is_file():
            card = CheckpointCard.from_dict(read_json(beside))
            if not self.is_reference(weights):
                return StoredModel(weights=weights, card=card)
        config = self.config_of_reference(weights, preset) if card is None else self.config_from(card.config)
        card = card or card_without_history(self.name, self.architecture_of(config), file)
        return StoredModel(weights=self.entering(weights, config), card=card)

    def check(self, stored: StoredModel, place: Path) -> None:
        """Refuses weights other than those of the card's architecture.

        Args:
            stored: The model.
            place: Where it is from, for errors.

        Raises:
            UserError: A weight is missing, unknown, or of another shape; names it.
        """
        with initialize():
            expected = dict(self.unallocated_network(stored.card).global_tensors())
        check_weights(stored.weights, expected, place, may_lack=stored.may_lack)

    def unallocated_network(self, card: CheckpointCard) -> Any:  # noqa: ANN401 - of this family's class
        """The network that a card speaks of, on the meta device; Megatron's process groups must be open."""
        # TransformerEngine would want a GPU, and its layers store the same weights.
        with torch.device("meta"):
            return self.network(self.config_from(card.config, backend="torch"), **stage_ends(None))

    def write(self, weights: Weights, card: CheckpointCard, target: Path, to: str) -> None:
        """Writes a model in one of the formats of `Target`, and its card."""
        if to == "nemo":
            nemo_format.save(
                weights, card, target, describe=lambda: self.unallocated_network(card).sharded_state_dict(prefix=PREFIX)
            )
            return
        if to == "reference":
            weights = self.leaving(weights, self.config_from(card.config, backend="torch"))
        write_file(weights, card, target)


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Weights of another dtype, each cast when it is read; None leaves them."""
    return weights if dtype is None else {name: weight.to(dtype) for name, weight in weights.items()}
