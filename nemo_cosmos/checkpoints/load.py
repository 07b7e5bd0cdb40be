"""Loading models for inference from any place that holds them.

A diffusion WFM must be loaded while Megatron's process groups are open; see `nemo_cosmos.parallel.startup.initialize`.
"""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import embedded_path
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import config_from
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
        place: Anything `nemo_cosmos.tokenizer.load.load` takes, or the name of embedded weights.

    Raises:
        UserError: There is none, it is a diffusion WFM, or its weights do not fit.
    """
    return load(place if Path(place).exists() else embedded_path(str(place)))


def load_network(place: str | Path) -> tuple[CosmosDiT, CheckpointCard]:
    """Loads a diffusion WFM's network in evaluation mode, with its card.

    Args:
        place: A NeMo checkpoint with a card, or the name of embedded weights.

    Raises:
        UserError: There is none, or a weight is missing or of another shape.
    """
    if not Path(place).exists():
        path = embedded_path(str(place))
        card = CheckpointCard.from_dict(read_json(path.with_suffix(".json")))
        network = _network(card)
        load_whole_weights(network, path)
        return network, card
    place = Path(place)
    if detect(place) is not Format.NEMO:
        raise UserError(f"{place}: is no NeMo checkpoint. Convert it first (nemo-cosmos convert ... --to nemo).")
    card = read_card(place)
    network = _network(card)
    load_weights(network, place)
    return network, card


def _network(card: CheckpointCard) -> CosmosDiT:
    return CosmosDiT(config_from(card.config), **stage_ends(None)).eval().requires_grad_(False)


def read_card(checkpoint: Path) -> CheckpointCard:
    """Reads `card.json` of a NeMo checkpoint.

    Raises:
        UserError: It is missing.
    """
    return CheckpointCard.from_dict(read_json(checkpoint / "card.json"))
