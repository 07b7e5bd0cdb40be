"""Loading a tokenizer for inference, or as a start of training, from any place that holds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stored_weights import is_nemo, read_whole
from nemo_cosmos.tokenizer import conversion, published, weights
from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.statistics import LatentStatistics, of_diffusers, read_published
from nemo_cosmos.weight_files.hub import local_path


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer and what came with it."""

    model: Tokenizer
    name: str
    """What it is called."""
    statistics: LatentStatistics = field(default_factory=LatentStatistics)
    """What its latents are normalised by, where the place tells it."""


def is_tokenizer(folder: Path) -> bool:
    """Tells whether a published, diffusers or our own folder says for certain that it holds a tokenizer."""
    if not conversion.is_diffusers(folder):
        return published.config_told_by(folder) is not None
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == conversion.DIFFUSERS_CLASS


def load(place: str | Path) -> LoadedTokenizer:
    """Loads a tokenizer in evaluation mode, float32.

    Args:
        place: Our folder, a published folder that tells its release, a diffusers folder, a NeMo checkpoint, or a
            `.safetensors` file with its card beside it; or its address on the hub.

    Raises:
        UserError: There is none, it is a diffusion WFM, or its weights do not fit.
    """
    place = local_path(place)
    if is_nemo(place):
        return _with_card(place, place / "card.json", read_whole)
    if place.suffix == ".safetensors" and place.with_suffix(".json").is_file():
        return _with_card(place, place.with_suffix(".json"), weights.read_tensors)
    if conversion.is_diffusers(place):
        model: Tokenizer = conversion.from_diffusers(place)
        statistics = of_diffusers(read_json(place / "config.json"), model.tokenizer_config.latent_channels)
        return LoadedTokenizer(model=model, name=place.name, statistics=statistics)
    if (place / weights.WEIGHTS_FILE).is_file():
        return LoadedTokenizer(model=weights.load(place), name=place.name)
    if published.is_published(place):
        model = published.load(place)
        statistics = read_published(place, model.tokenizer_config.latent_channels)
        return LoadedTokenizer(model=model, name=place.name, statistics=statistics)
    raise UserError(
        f"{place}: no tokenizer can be loaded from here, expected a NeMo checkpoint, a published or diffusers folder, "
        "our own folder, or a .safetensors file with its card beside it. Check the path; does it hold other weights? "
        "Convert it first (nemo-cosmos convert)."
    )


def _with_card(place: Path, card_path: Path, read: Callable[[Path], dict[str, Tensor]]) -> LoadedTokenizer:
    values = read_json(card_path)
    config, card = weights.config_of_card(values, place), CheckpointCard.from_dict(values)
    return LoadedTokenizer(
        model=weights.build(config, read(place), dtype=torch.float32),
        name=card.model if place.is_dir() else place.stem,
        statistics=LatentStatistics.of_card(card),
    )
