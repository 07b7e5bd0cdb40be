"""Opening a diffusion WFM in any format that holds one: names, shapes and card at once, each weight when it is read."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.family import Family, StoredModel
from nemo_cosmos.checkpoints.weight_file import card_without_history
from nemo_cosmos.diffusion import state_dict as names
from nemo_cosmos.diffusion.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.diffusion.config import PRESETS
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.published import config_of_reference, is_reference
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer import conversion
from nemo_cosmos.weight_files.safetensors_files import open_shards

TRANSFORMER_CLASS = "CosmosTransformer3DModel"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMER, VAE = "transformer", "vae"
"""Folders of a diffusers pipeline."""


DIFFUSION = Family(
    name="diffusion",
    presets=PRESETS,
    network=CosmosDiT,
    is_architecture=is_architecture,
    architecture_of=architecture_of,
    config_from=config_from,
    is_reference=is_reference,
    config_of_reference=config_of_reference,
    entering=partial(names.entering, source="reference"),
    leaving=partial(names.leaving, target="reference"),
)


def is_wfm(place: Path, preset: str | None) -> bool:
    """Tells whether a diffusion WFM lies at a path, or something else, such as a tokenizer.

    Args:
        place: A file or folder of a known format.
        preset: The architecture that the user names, or None.

    Raises:
        UserError: It is broken, or none of the formats.
    """
    found = detect(place)
    if found is Format.DIFFUSERS:
        return read_json(place / "config.json").get("_class_name") != conversion.DIFFUSERS_CLASS
    return found is Format.PIPELINE or DIFFUSION.lies_at(place, preset)


def open_wfm(place: Path, preset: str | None = None) -> StoredModel:
    """Opens a diffusion WFM whose weights are exactly those of its architecture.

    Args:
        place: A diffusers folder of the transformer, or a pipeline's; or what `Family.open` takes.
        preset: As `Family.open` takes it.

    Raises:
        UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
    """
    found = detect(place)
    if found not in (Format.PIPELINE, Format.DIFFUSERS):
        return DIFFUSION.open(place, preset)
    if found is Format.PIPELINE:
        wfm = _with_vae(_open_diffusers(place / TRANSFORMER), place / VAE)
    else:
        wfm = _open_diffusers(place)
    DIFFUSION.check(wfm, place)
    return wfm


def _open_diffusers(folder: Path) -> StoredModel:
    values = read_json(folder / "config.json")
    if values.get("_class_name", TRANSFORMER_CLASS) != TRANSFORMER_CLASS:
        raise user_error(f"{folder}/config.json", values["_class_name"], TRANSFORMER_CLASS, "Give that model's folder.")
    config = names.config_from_diffusers(values)
    weights = names.entering(open_shards(folder, WEIGHTS_FILE), config, "diffusers")
    return StoredModel(
        weights=weights,
        card=card_without_history("diffusion", architecture_of(config), folder),
        may_lack=names.NOT_IN_DIFFUSERS,
    )


def _with_vae(wfm: StoredModel, vae: Path) -> StoredModel:
    """Adds what a pipeline's VAE tells of the latents; without statistics a pipeline leaves latents as they are."""
    values, channels = read_json(vae / "config.json"), wfm.card.config["in_channels"]
    mean, std = (
        tuple(values.get(name) or (neutral,) * channels)
        for name, neutral in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    fingerprint = conversion.from_diffusers(vae).fingerprint()
    card = dataclasses.replace(wfm.card, tokenizer_fingerprint=fingerprint, latent_mean=mean, latent_std=std)
    return dataclasses.replace(wfm, card=card)
