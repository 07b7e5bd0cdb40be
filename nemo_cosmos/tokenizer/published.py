"""Folders in the layout of the published tokenizers: TorchScript files or a `.pt`, and what stands beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import RELEASED, TokenizerConfig, preset
from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.pickled import read_pt
from nemo_cosmos.tokenizer.torchscript_archive import read_torchscript

ENCODER, DECODER, AUTOENCODER, TRAINED = "encoder.jit", "decoder.jit", "autoencoder.jit", "model.pt"

_DECODERS_QUANTIZER = "inv_quant."
"""Put before the names of the quantizer's constants in `decoder.jit`."""


def is_published(folder: Path) -> bool:
    """Tells whether a folder holds a whole tokenizer in the published layout."""
    return any(all((folder / name).is_file() for name in group) for group in ((ENCODER, DECODER), (AUTOENCODER,))) or (
        (folder / TRAINED).is_file()
    )


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Reads a published tokenizer whose folder tells what it is.

    Args:
        folder: As `read_weights` takes it.
        dtype: Floating-point type of the weights in memory.

    Raises:
        UserError: The folder does not tell its architecture, or is broken or of another one.
    """
    folder = Path(folder)
    config = config_told_by(folder)
    if config is None:
        raise UserError(
            f"{folder}: neither its name nor a config.json tells which release this is. Name the folder as it is "
            "published, or convert it (nemo-cosmos convert --preset)."
        )
    return weights.build(config, names.from_reference_names(read_weights(folder), config), dtype=dtype)


def read_weights(place: str | Path) -> dict[str, Tensor]:
    """Reads the reference's state dict; no code of the files is run.

    Args:
        place: A folder with `encoder.jit` and `decoder.jit`, else `autoencoder.jit`, else `model.pt`; or one `.jit`,
            `.pt` or `.safetensors` file.

    Raises:
        UserError: A file is missing or broken, or holds more than tensors.
    """
    place = Path(place)
    if place.suffix == ".safetensors":
        return weights.read_tensors(place)
    if place.suffix == ".pt":
        return read_pt(place)
    if place.suffix == ".jit":
        return _plain_names(read_torchscript(place))
    if (place / ENCODER).is_file() and (place / DECODER).is_file():
        return _joined(place)
    if (place / AUTOENCODER).is_file():
        return read_torchscript(place / AUTOENCODER)
    return read_pt(place / TRAINED)


def _joined(folder: Path) -> dict[str, Tensor]:
    encoder, decoder = (_plain_names(read_torchscript(folder / name)) for name in (ENCODER, DECODER))
    for name in encoder.keys() & decoder.keys():
        if not torch.equal(encoder[name], decoder[name]):
            raise UserError(f"{folder}: {name} differs between {ENCODER} and {DECODER}. Give the two of one release.")
    return encoder | decoder


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_DECODERS_QUANTIZER): tensor for name, tensor in tensors.items()}


def config_told_by(place: str | Path) -> TokenizerConfig | None:
    """Returns the architecture that a folder, or the folder of a file, tells for certain; else None.

    It tells it by our own `config.json`, by a `config.json` that holds the name of a release, or by being called as one
    (`Cosmos-Tokenize1-CV8x8x8-720p`, or in a cache of Hugging Face
    `models--nvidia--Cosmos-Tokenize1-CV8x8x8-720p/snapshots/<commit>`), as given or as links lead.

    Raises:
        UserError: They name different releases.
    """
    place = Path(place)
    folder = place if place.is_dir() else place.parent
    values: Any = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    values = values if isinstance(values, dict) else {}
    if "patch_method" in values:
        return TokenizerConfig.from_dict(values)
    told = [value.removeprefix("nvidia/") for value in values.values() if isinstance(value, str)]
    # abspath keeps the names of links, which the user chose.
    told += [_repository(path) for path in (Path(os.path.abspath(folder)), folder.resolve())]
    releases = {name for name in told if name in RELEASED}
    architectures = {preset(name) for name in releases}
    if len(architectures) > 1:
        raise user_error(str(folder), sorted(releases), "the name of one release", "Say which it is: --preset.")
    return architectures.pop() if architectures else None


def _repository(folder: Path) -> str:
    """The published name that a folder's path would give it."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--nvidia--")
    return folder.name
