"""Telling what lies at a path."""

from __future__ import annotations

import enum
from pathlib import Path

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.stored_weights import is_nemo
from nemo_cosmos.tokenizer.conversion import is_diffusers
from nemo_cosmos.tokenizer.published import is_published


class Format(enum.Enum):
    """Formats that are read."""

    NEMO = "a NeMo distributed checkpoint"
    PIPELINE = "a diffusers pipeline folder"
    DIFFUSERS = "a diffusers folder"
    FOLDER = "a tokenizer folder"
    PUBLISHED = "a published folder"
    REFERENCE = "reference weights"


def detect(path: str | Path) -> Format:
    """Tells a checkpoint's format from its files.

    Raises:
        UserError: Nothing is there, or it is none of the known formats.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint. Check the path.")
    if path.is_file() and path.suffix in (".jit", ".pt", ".safetensors"):
        return Format.REFERENCE
    if is_nemo(path):
        return Format.NEMO
    if (path / "model_index.json").is_file():
        return Format.PIPELINE
    if is_diffusers(path):
        return Format.DIFFUSERS
    if (path / "model.safetensors").is_file():
        return Format.FOLDER
    if is_published(path):
        return Format.PUBLISHED
    raise UserError(
        f"{path}: is none of: a NeMo checkpoint (weights/metadata.json), a diffusers folder "
        "(diffusion_pytorch_model.safetensors), a diffusers pipeline (model_index.json), a tokenizer folder "
        "(model.safetensors), a published folder (model.pt; of tokenizers also encoder.jit and decoder.jit, or "
        "autoencoder.jit), a .jit, .pt or .safetensors file."
    )
