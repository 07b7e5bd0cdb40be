"""Opening a diffusion WFM in any format that holds one: names, shapes and card at once, each weight when it is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_cosmos.autoregressive.architecture import is_architecture
from nemo_cosmos.autoregressive.diffusion_decoder.architecture import is_architecture as is_decoder_architecture
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.nemo_format import open_weights
from nemo_cosmos.checkpoints.weight_file import card_without_history, check_weights, file_at, open_file
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion import state_dict as names
from nemo_cosmos.diffusion.architecture import architecture_of, config_from
from nemo_cosmos.diffusion.config import PRESETS
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.published import config_of_reference, is_reference
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer import conversion, published
from nemo_cosmos.weight_files.safetensors_files import open_shards
from nemo_cosmos.weight_files.stored_tensor import Weights

TRANSFORMER_CLASS = "CosmosTransformer3DModel"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMER, VAE = "transformer", "vae"
"""Folders of a diffusers pipeline."""


@dataclass(frozen=True, kw_only=True)
class StoredWfm:
    """A diffusion WFM between two formats."""

    weights: Weights
    """Whole, under our names."""
    card: CheckpointCard
    may_lack: tuple[str, ...] = ()
    """Our names that the source format cannot hold."""


def is_wfm(place: Path, preset: str | None) -> bool:
    """Tells whether a diffusion WFM lies at a path, or something else, such as a tokenizer.

    Args:
        place: A file or folder of a known format.
        preset: The architecture that the user names, or None.

    Raises:
        UserError: It is broken, or none of the formats.
    """
    found = detect(place)
    if found is Format.PIPELINE:
        return True
    if found is Format.NEMO:
        return is_wfm_card(CheckpointCard.from_dict(read_json(place / "card.json")))
    if found is Format.DIFFUSERS:
        return read_json(place / "config.json").get("_class_name") != conversion.DIFFUSERS_CLASS
    file = file_at(place)
    if preset is not None or file is None:
        return preset in PRESETS
    if (card := file.with_suffix(".json")).is_file():
        return is_wfm_card(CheckpointCard.from_dict(read_json(card)))
    return published.config_told_by(file) is None and is_reference(open_file(file))


def is_wfm_card(card: CheckpointCard) -> bool:
    """Tells whether a card speaks of a diffusion WFM."""
    others = is_architecture(card.config) or is_decoder_architecture(card.config)
    return "patch_method" not in card.config and not others


def open_wfm(place: Path, preset: str | None = None) -> StoredWfm:
    """Opens a diffusion WFM whose weights are exactly those of its architecture.

    Args:
        place: A NeMo checkpoint with its card; a diffusers folder of the transformer, or a pipeline's; a `.pt` or
            `.safetensors` file under the reference's names; or a `.safetensors` file under ours with its card beside
            it. A card beside a file, as conversion writes it, tells the architecture.
        preset: A name of `diffusion.config.PRESETS`, for reference weights that are no published model's and come
            without a card.

    Raises:
        UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
    """
    found = detect(place)
    if found is Format.NEMO:
        wfm = StoredWfm(weights=open_weights(place), card=CheckpointCard.from_dict(read_json(place / "card.json")))
    elif found is Format.PIPELINE:
        wfm = _with_vae(_open_diffusers(place / TRANSFORMER), place / VAE)
    elif found is Format.DIFFUSERS:
        wfm = _open_diffusers(place)
    elif (file := file_at(place)) is not None:
        wfm = _open_reference_or_ours(file, preset)
    else:
        raise UserError(f"{place}: is {found.value}, from which no diffusion WFM is read. Check the path.")
    with initialize():
        expected = dict(unallocated_network(wfm.card).global_tensors())
    check_weights(wfm.weights, expected, place, may_lack=wfm.may_lack)
    return wfm


def _open_reference_or_ours(file: Path, preset: str | None) -> StoredWfm:
    weights, card = open_file(file), None
    if preset is None and (beside := file.with_suffix(".json")).is_file():
        card = CheckpointCard.from_dict(read_json(beside))
        if not is_reference(weights):
            return StoredWfm(weights=weights, card=card)
    config = config_of_reference(weights, preset) if card is None else config_from(card.config)
    entered = names.entering(weights, config, "reference")
    return StoredWfm(weights=entered, card=card or card_without_history("diffusion", architecture_of(config), file))


def _open_diffusers(folder: Path) -> StoredWfm:
    values = read_json(folder / "config.json")
    if values.get("_class_name", TRANSFORMER_CLASS) != TRANSFORMER_CLASS:
        raise user_error(f"{folder}/config.json", values["_class_name"], TRANSFORMER_CLASS, "Give that model's folder.")
    config = names.config_from_diffusers(values)
    weights = names.entering(open_shards(folder, WEIGHTS_FILE), config, "diffusers")
    return StoredWfm(
        weights=weights,
        card=card_without_history("diffusion", architecture_of(config), folder),
        may_lack=names.NOT_IN_DIFFUSERS,
    )


def _with_vae(wfm: StoredWfm, vae: Path) -> StoredWfm:
    """Adds what a pipeline's VAE tells of the latents; without statistics a pipeline leaves latents as they are."""
    values, channels = read_json(vae / "config.json"), wfm.card.config["in_channels"]
    mean, std = (
        tuple(values.get(name) or (neutral,) * channels)
        for name, neutral in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    fingerprint = conversion.from_diffusers(vae).fingerprint()
    card = dataclasses.replace(wfm.card, tokenizer_fingerprint=fingerprint, latent_mean=mean, latent_std=std)
    return dataclasses.replace(wfm, card=card)


def unallocated_network(card: CheckpointCard) -> CosmosDiT:
    """The network that a card speaks of, on the meta device; Megatron's process groups must be open."""
    # TransformerEngine would want a GPU, and its layers store the same weights.
    with torch.device("meta"):
        return CosmosDiT(config_from(card.config, backend="torch"), **stage_ends(None))
