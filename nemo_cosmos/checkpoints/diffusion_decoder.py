"""Opening and converting a diffusion decoder, weight by weight: few of them are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nemo_cosmos.autoregressive.diffusion_decoder.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.autoregressive.diffusion_decoder.config import PRESETS, DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.autoregressive.diffusion_decoder.published import config_of_reference, is_reference
from nemo_cosmos.autoregressive.diffusion_decoder.state_dict import entering, leaving
from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.checkpoints.latents import with_latents
from nemo_cosmos.checkpoints.weight_file import card_without_history, check_weights, file_at, open_file, write_file
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.warm_start import copy_whole_weights
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import PREFIX
from nemo_cosmos.tokenizer import published
from nemo_cosmos.weight_files.stored_tensor import Weights

Target = Literal["nemo", "reference", "safetensors"]
"""Formats that a diffusion decoder may have."""


@dataclass(frozen=True, kw_only=True)
class StoredDiffusionDecoder:
    """A diffusion decoder between two formats, or that is not loaded yet."""

    weights: Weights
    """Whole, under our names."""
    card: CheckpointCard

    def config(self, **layout: Any) -> DiffusionDecoderConfig:  # noqa: ANN401 - fields of DiTConfig
        """The architecture, with fields of how to run it.

        Raises:
            UserError: The card does not tell a whole architecture.
        """
        return config_from(self.card.config, **layout)

    def load(self, **layout: Any) -> DiffusionDecoderDiT:  # noqa: ANN401 - fields of DiTConfig
        """Builds and fills this rank's part, in evaluation mode, on the CPU; Megatron's process groups must be open."""
        network = DiffusionDecoderDiT(self.config(**layout), **stage_ends(None)).eval().requires_grad_(False)
        read: Callable[[str], torch.Tensor] = lambda name: self.weights[name].read()  # noqa: E731
        copy_whole_weights(network, self.weights, read, source=self.card.model)
        return network


def is_diffusion_decoder(place: Path, preset: str | None) -> bool:
    """Tells whether a diffusion decoder lies at a path, or something else.

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


def find_diffusion_decoder(place: str | Path, preset: str | None = None) -> StoredDiffusionDecoder:
    """Opens a diffusion decoder whose weights are exactly those of its architecture.

    Args:
        place: A NeMo checkpoint with its card; a `.pt` or `.safetensors` file under the reference's names, or a
            published folder with a `model.pt`; or a `.safetensors` file under our names with its card beside it; named
            as `find_checkpoint` takes it.
        preset: A name of `diffusion_decoder.config.PRESETS`, for reference weights that are no published model's and
            come without a card.

    Raises:
        UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
    """
    path = find_checkpoint(place)
    if not is_diffusion_decoder(path, preset):
        raise UserError(f"{place}: is no diffusion decoder. Give one that diffusion_decoder_tiny_finetune trained.")
    if detect(path) is Format.NEMO:
        card = CheckpointCard.from_dict(read_json(path / "card.json"))
        stored = StoredDiffusionDecoder(weights=nemo_format.open_weights(path), card=card)
    else:
        file = file_at(path)
        assert file is not None  # by is_diffusion_decoder
        stored = _open_file(file, preset)
    with initialize():
        check_weights(stored.weights, dict(unallocated_network(stored.card).global_tensors()), path)
    return stored


def _open_file(file: Path, preset: str | None) -> StoredDiffusionDecoder:
    weights, card = open_file(file), None
    if preset is None and (beside := file.with_suffix(".json")).is_file():
        card = CheckpointCard.from_dict(read_json(beside))
        if not is_reference(weights):
            return StoredDiffusionDecoder(weights=weights, card=card)
    config = config_of_reference(weights, preset) if card is None else config_from(card.config)
    return StoredDiffusionDecoder(
        weights=entering(weights, config),
        card=card or card_without_history("diffusion_decoder", architecture_of(config), file),
    )


def unallocated_network(card: CheckpointCard) -> DiffusionDecoderDiT:
    """The network that a card speaks of, on the meta device; Megatron's process groups must be open."""
    # TransformerEngine would want a GPU, and its layers store the same weights.
    with torch.device("meta"):
        return DiffusionDecoderDiT(config_from(card.config, backend="torch"), **stage_ends(None))


def convert_diffusion_decoder(
    source: Path,
    target: Path,
    *,
    to: str,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
) -> Weights:
    """Converts a diffusion decoder; arguments are those of `nemo_cosmos.checkpoints.convert.convert`.

    `tokenizer` is the continuous one, whose latents are drawn.

    Returns:
        What was written, under our names.

    Raises:
        UserError: The source is unknown or damaged, or the target cannot hold the model.
    """
    if to not in get_args(Target):
        raise user_error("--to", to, f"one of {get_args(Target)}", "Of diffusion decoders no others are written.")
    stored = find_diffusion_decoder(source, preset)
    card, weights = stored.card, stored.weights
    if (tokenizer, statistics) != (None, None):
        card = with_latents(card, tokenizer=tokenizer, statistics=statistics)
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if to == "nemo":
        nemo_format.save(
            weights, card, target, describe=lambda: unallocated_network(card).sharded_state_dict(prefix=PREFIX)
        )
    elif to == "reference":
        write_file(leaving(weights, config_from(card.config, backend="torch")), card, target)
    else:
        write_file(weights, card, target)
    return weights
