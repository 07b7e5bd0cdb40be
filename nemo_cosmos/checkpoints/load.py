"""Loading models for inference from any place that holds them.

A WFM must be loaded while Megatron's process groups are open; see `nemo_cosmos.parallel.startup.initialize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron.core.transformer.module import MegatronModule

from nemo_cosmos.autoregressive import architecture as autoregressive
from nemo_cosmos.autoregressive import warm_start as autoregressive_weights
from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion import architecture as diffusion
from nemo_cosmos.diffusion import warm_start as diffusion_weights
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
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
        UserError: There is none, it is a WFM, or its weights do not fit.
    """
    return load(find_checkpoint(place))


Config = TypeVar("Config")
Network = TypeVar("Network", bound=MegatronModule)


@dataclass(frozen=True, kw_only=True)
class NetworkKind(Generic[Config, Network]):
    """A family of WFMs."""

    config_from: Callable[..., Config]
    """Makes the configuration of a card's architecture and of fields of how to run it."""
    network: type[Network]
    load_whole_weights: Callable[[Network, Path], None]
    """Copies this rank's share of a safetensors file into a network."""


DIFFUSION = NetworkKind[DiTConfig, CosmosDiT](
    config_from=diffusion.config_from, network=CosmosDiT, load_whole_weights=diffusion_weights.load_whole_weights
)
AUTOREGRESSIVE = NetworkKind[ARConfig, CosmosAR](
    config_from=autoregressive.config_from,
    network=CosmosAR,
    load_whole_weights=autoregressive_weights.load_whole_weights,
)


@dataclass(frozen=True, kw_only=True)
class StoredNetwork(Generic[Config, Network]):
    """A WFM's network that is told of by its card and not loaded yet."""

    kind: NetworkKind[Config, Network]
    card: CheckpointCard
    fill: Callable[[Network], None]
    """Copies this rank's share of the weights into the network."""

    def config(self, **layout: Any) -> Config:  # noqa: ANN401 - fields of the kind's configuration
        """The architecture, with fields of how to run it.

        Raises:
            UserError: The card does not tell a whole architecture.
        """
        return self.kind.config_from(self.card.config, **layout)

    def load(self, **layout: Any) -> Network:  # noqa: ANN401 - fields of the kind's configuration
        """Builds and fills this rank's part, in evaluation mode, on the CPU.

        Raises:
            UserError: A weight is missing or of another shape.
        """
        network = self.kind.network(self.config(**layout), **stage_ends(None)).eval().requires_grad_(False)
        self.fill(network)
        return network


def find_network(place: str | Path) -> StoredNetwork:
    """Finds a WFM's network, diffusion or autoregressive, and reads its card.

    Args:
        place: A NeMo checkpoint with a card, or a `.safetensors` file of whole weights with its card beside it, named
            as `find_checkpoint` takes it.

    Raises:
        UserError: There is none.
    """
    folder = find_checkpoint(place)
    if folder.suffix == ".safetensors" and folder.with_suffix(".json").is_file():
        card = CheckpointCard.from_dict(read_json(folder.with_suffix(".json")))
        kind = _kind_of(card)
        return StoredNetwork(kind=kind, card=card, fill=lambda network: kind.load_whole_weights(network, folder))
    if detect(folder) is not Format.NEMO:
        raise UserError(f"{folder}: is no NeMo checkpoint. Convert it first (nemo-cosmos convert ... --to nemo).")
    card = read_card(folder)
    return StoredNetwork(kind=_kind_of(card), card=card, fill=lambda network: load_weights(network, folder))


def _kind_of(card: CheckpointCard) -> NetworkKind:
    return AUTOREGRESSIVE if autoregressive.is_architecture(card.config) else DIFFUSION


def load_network(place: str | Path) -> tuple[MegatronModule, CheckpointCard]:
    """Loads a WFM's network in evaluation mode, with its card.

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
