"""Files of a WFM's weights with their card beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_cosmos import __version__
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.weight_files.safetensors_files import open_safetensors, write_safetensors
from nemo_cosmos.weight_files.stored_tensor import Weights
from nemo_cosmos.weight_files.torch_files import open_pt, write_pt

PUBLISHED_FILE = "model.pt"
"""A published model in a folder of its own."""


def file_at(place: Path) -> Path | None:
    """The file of weights at a path, where it may hold a WFM."""
    if place.suffix in (".pt", ".safetensors") and place.is_file():
        return place
    return place / PUBLISHED_FILE if (place / PUBLISHED_FILE).is_file() else None


def open_file(file: Path) -> Weights:
    """Opens a `.pt` or `.safetensors` file.

    Raises:
        UserError: It is broken.
    """
    return open_safetensors(file) if file.suffix == ".safetensors" else open_pt(file)


def write_file(weights: Weights, card: CheckpointCard, target: Path) -> None:
    """Writes a `.pt` or `.safetensors` file, and the card beside it."""
    card_path = target.with_suffix(".json")
    with written_aside(target) as aside:
        if target.suffix == ".pt":
            write_pt(aside, weights)
        else:
            write_safetensors(aside, weights)
        # A kill before the new card stands leaves weights without a card, which nobody takes for others.
        card_path.unlink(missing_ok=True)
    write_json(card_path, card.to_dict())


def card_without_history(model: str, config: dict[str, Any], source: Path) -> CheckpointCard:
    """The card of weights that came without one.

    Args:
        model: The kind of WFM.
        config: Its architecture.
        source: Where the weights are from.
    """
    return CheckpointCard(
        model=model,
        config=config,
        step=0,
        data="not known",
        command="nemo-cosmos convert",
        parent=str(source),
        versions={"nemo_cosmos": __version__},
    )


def check_weights(
    weights: Weights, expected: Mapping[str, torch.Tensor], place: Path, *, may_lack: Collection[str] = ()
) -> None:
    """Refuses weights other than those of a network.

    Args:
        weights: By name.
        expected: The network's tensors under the same names; only shapes are read.
        place: Where the weights are from, for errors.
        may_lack: Names that may be absent.

    Raises:
        UserError: A weight is missing, unknown, or of another shape; names it.
    """
    missing = sorted(name for name in expected if name not in weights and name not in may_lack)
    unknown = sorted(name for name in weights if name not in expected)
    if missing or unknown:
        raise user_error(
            f"weights of {place}",
            f"{len(missing)} missing {missing[:4]}, {len(unknown)} unknown {unknown[:4]}",
            "exactly those of the card's architecture",
            "Convert a whole checkpoint.",
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise user_error(
                f"{place}: weight {name}",
                list(weight.shape),
                f"{list(expected[name].shape)}, as its architecture says",
                "Choose the preset or card that it belongs to.",
            )
