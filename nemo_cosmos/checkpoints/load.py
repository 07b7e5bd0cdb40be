"""Loading models for inference from any place that holds them.

A diffusion WFM must be loaded while Megatron's process groups are open; see `nemo_cosmos.parallel.startup.initialize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import config_from
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.warm_start import load_whole_weights
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.tokenizer.load import LoadedTokenizer, load
from nemo_cosmos.training.load import load_weights


def load_tokenizer(place: str | Path) -> LoadedTokenizer:
    """Loads a tokenizer in evaluation mode, float32.

    Args:
        place: Anything `find_checkpoint` takes.

    Raises:
        UserError: There is none, it is a diffusion WFM, or its weights do not fit.
    """
    return load(find_checkpoint(place))


@dataclass(frozen=True, kw_only=True)
class StoredNetwork:
    """A diffusion WFM's network that is told of by its card and not loaded yet."""

    card: CheckpointCard
    fill: Callable[[CosmosDiT], None]
    """Copies this rank's share of the weights into the network."""

    def config(self, **layout: Any) -> DiTConfig:  # noqa: ANN401 - fields of DiTConfig
        """The architecture, with fields of how to run it.

        Raises:
            UserError: The card does not tell a whole architecture.
        """
        return config_from(self.card.config, **layout)

    def load(self, **layout: Any) -> CosmosDiT:  # noqa: ANN401 - fields of DiTConfig
        """Builds and fills this rank's part, in evaluation mode, on the CPU.

        Raises:
            UserError: A weight is missing or of another shape.
        """
        network = CosmosDiT(self.config(**layout), **stage_ends(None)).eval().requires_grad_(False)
        self.fill(network)
        return network


def find_network(place: str | Path) -> StoredNetwork:
    """Finds a diffusion WFM's network and reads its card.

    Args:
        place: A NeMo checkpoint with a card, or a `.safetensors` file of whole weights with its card beside it, named
            as `find_checkpoint` takes it.

    Raises:
        UserError: There is none.
    """
    folder = find_checkpoint(place)
    if folder.suffix == ".safetensors" and folder.with_suffix(".json").is_file():
        card = CheckpointCard.from_dict(read_json(folder.with_suffix(".json")))
        return StoredNetwork(card=card, fill=lambda network: load_whole_weights(network, folder))
    if detect(folder) is not Format.NEMO:
        raise UserError(f"{folder}: is no NeMo checkpoint. Convert it first (nemo-cosmos convert ... --to nemo).")
    return StoredNetwork(card=read_card(folder), fill=lambda network: load_weights(network, folder))


def load_network(place: str | Path) -> tuple[CosmosDiT, CheckpointCard]:
    """Loads a diffusion WFM's network in evaluation mode, with its card.

    Args:
        place: Anything `find_network` takes.

    Raises:
        UserError: There is none, or a weight is missing or of another shape.
    """
    stored = find_network(place)
    return stored.load(), stored.card


def read_card(checkpoint: Path) -> CheckpointCard:
    """Reads `card.json` of a NeMo checkpoint.

    Raises:
        UserError: It is missing.
    """
    return CheckpointCard.from_dict(read_json(checkpoint / "card.json"))
