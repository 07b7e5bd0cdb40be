"""Opening and converting an autoregressive WFM, weight by weight: few of them are in memory at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import torch

from nemo_cosmos.autoregressive.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.autoregressive.config import PRESETS
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.published import config_of_reference, is_reference
from nemo_cosmos.autoregressive.shards import merge_shards, shard_files
from nemo_cosmos.autoregressive.state_dict import entering, leaving
from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.checkpoints.weight_file import card_without_history, check_weights, file_at, open_file, write_file
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import PREFIX
from nemo_cosmos.tokenizer import published
from nemo_cosmos.weight_files.stored_tensor import Weights

Target = Literal["nemo", "reference", "safetensors"]
"""Formats that an autoregressive WFM may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredAR:
    """An autoregressive WFM between two formats."""

    weights: Weights
    """Whole, under our names."""
    card: CheckpointCard


def is_autoregressive(place: Path, preset: str | None) -> bool:
    """Tells whether an autoregressive WFM lies at a path, or something else.

    Args:
        place: A file or folder of a known format.
        preset: The architecture that the user names, or None.

    Raises:
        UserError: It is broken, or none of the formats.
    """
    found = detect(place)
    if found is Format.NEMO:
        return is_architecture(read_json(place / "card.json").get("config", {}))
    file = file_at(place)
    if found in (Format.PIPELINE, Format.DIFFUSERS) or file is None:
        return False
    if preset is not None:
        return preset in PRESETS
    if (card := file.with_suffix(".json")).is_file():
        return is_architecture(read_json(card).get("config", {}))
    return published.config_told_by(file) is None and is_reference(open_file(file))


def open_autoregressive(place: Path, preset: str | None = None) -> StoredAR:
    """Opens an autoregressive WFM whose weights are exactly those of its architecture.

    Args:
        place: A NeMo checkpoint with its card; a `.pt` or `.safetensors` file under the reference's names, of which
            there is one for each rank where tensor-parallel ranks share the weights (`..._mp_0.pt` and so on; name
            any); or a `.safetensors` file under ours with its card beside it. A card beside a file, as conversion
            writes it, tells the architecture.
        preset: A name of `autoregressive.config.PRESETS`, for reference weights that are no published model's and come
            without a card.

    Raises:
        UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
    """
    if detect(place) is Format.NEMO:
        stored = StoredAR(
            weights=nemo_format.open_weights(place), card=CheckpointCard.from_dict(read_json(place / "card.json"))
        )
    elif (file := file_at(place)) is not None:
        stored = _open_file(file, preset)
    else:
        raise UserError(f"{place}: no autoregressive WFM is read from this. Check the path.")
    with initialize():
        check_weights(stored.weights, dict(unallocated_network(stored.card).global_tensors()), place)
    return stored


def _open_file(file: Path, preset: str | None) -> StoredAR:
    card = None
    if preset is None and (beside := file.with_suffix(".json")).is_file():
        card = CheckpointCard.from_dict(read_json(beside))
    weights = merge_shards([open_file(shard) for shard in shard_files(file)])
    if card is not None and not is_reference(weights):
        return StoredAR(weights=weights, card=card)
    config = config_of_reference(weights, preset) if card is None else config_from(card.config)
    return StoredAR(
        weights=entering(weights, config),
        card=card or card_without_history("autoregressive", architecture_of(config), file),
    )


def unallocated_network(card: CheckpointCard) -> CosmosAR:
    """The network that a card speaks of, on the meta device; Megatron's process groups must be open."""
    # TransformerEngine would want a GPU, and its layers store the same weights.
    with torch.device("meta"):
        return CosmosAR(config_from(card.config, backend="torch"), **stage_ends(None))


def convert_autoregressive(
    source: Path,
    target: Path,
    *,
    to: str,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Weights:
    """Converts an autoregressive WFM; arguments are those of `nemo_cosmos.checkpoints.convert.convert`.

    Returns:
        What was written, under our names.

    Raises:
        UserError: The source is unknown or damaged, or the target cannot hold the model.
    """
    if to not in get_args(Target):
        raise user_error("--to", to, f"one of {get_args(Target)}", "Of autoregressive WFMs no others are written.")
    stored = open_autoregressive(source, preset)
    card, weights = stored.card, stored.weights
    if tokenizer is not None:
        card = dataclasses.replace(card, tokenizer_fingerprint=load_tokenizer(tokenizer).model.fingerprint())
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if to == "nemo":
        nemo_format.save(
            weights, card, target, describe=lambda: unallocated_network(card).sharded_state_dict(prefix=PREFIX)
        )
    elif to == "reference":
        card = dataclasses.replace(card, config={**card.config, "num_medusa_heads": 0})  # that format has none
        write_file(leaving(weights, config_from(card.config, backend="torch")), card, target)
    else:
        write_file(weights, card, target)
    return weights
