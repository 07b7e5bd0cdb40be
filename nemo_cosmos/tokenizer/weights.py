"""Our own tokenizer files: folders with `model.safetensors` and `config.json`, and `.safetensors` files with cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import Tokenizer, build_tokenizer
from nemo_cosmos.tokenizer.state_dict import check_names

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "tokenizer_tiny.safetensors"
"""Weights trained by our own recipe; the card with their config stands beside them as `.json`."""


def save(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Writes weights and config into a folder, which appears complete or not at all.

    Args:
        tokenizer: What to save, in the dtype that it has.
        folder: Where; an older one is replaced.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with written_aside(folder) as aside:
        aside.mkdir()
        write_tensors(aside / WEIGHTS_FILE, tokenizer.state_dict())
        write_json(aside / CONFIG_FILE, tokenizer.tokenizer_config.to_dict())
    return folder


def load(place: str | Path, *, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Reads a tokenizer in one of our own formats.

    Args:
        place: Folder with `model.safetensors` and `config.json`, as `save` writes; or a `.safetensors` file with its
            card beside it, as embedded weights are and `convert` writes.
        dtype: Floating-point type of the weights in memory.

    Returns:
        The tokenizer on the CPU, in evaluation mode.

    Raises:
        UserError: A file is missing or broken, or the weights do not fit the config.
    """
    place = Path(place)
    if place.suffix == ".safetensors":
        config = config_of_card(read_json(place.with_suffix(".json")), place)
        return build(config, read_tensors(place), dtype=dtype)
    config = TokenizerConfig.from_dict(read_json(place / CONFIG_FILE))
    return build(config, read_tensors(place / WEIGHTS_FILE), dtype=dtype)


def config_of_card(card: Mapping[str, Any], place: str | Path) -> TokenizerConfig:
    """Reads the architecture out of a card's JSON; `place` is what the card speaks of, for messages.

    Raises:
        UserError: The card is that of a diffusion WFM, or broken.
    """
    values = card.get("config", {})
    if "patch_method" not in values:
        raise UserError(f"{place}: is a diffusion WFM, expected a tokenizer. Give a tokenizer's folder, file or name.")
    return TokenizerConfig.from_dict(values)


def load_default(path: Path = DEFAULT_WEIGHTS, *, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Reads the embedded default tokenizer.

    Args:
        path: The `.safetensors` file; its card stands beside it.
        dtype: Floating-point type of the weights in memory.

    Raises:
        UserError: This installation holds no embedded tokenizer.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: this installation holds no trained tokenizer. Train one with the recipe `tokenizer_tiny`, "
            "or give the folder of another tokenizer."
        )
    return load(path, dtype=dtype)


def build(config: TokenizerConfig, weights: dict[str, Tensor], *, dtype: torch.dtype) -> Tokenizer:
    """Makes a tokenizer from its config and weights in our names.

    Args:
        config: The architecture.
        weights: Every weight, by our name.
        dtype: Floating-point type of the weights in memory.

    Returns:
        The tokenizer on the CPU, in evaluation mode.

    Raises:
        UserError: A weight is missing, unknown, or has another shape than the config says.
    """
    check(config, weights)
    tokenizer = build_tokenizer(config).to(dtype)
    tokenizer.load_state_dict(weights)
    return tokenizer.eval()


def check(config: TokenizerConfig, weights: Mapping[str, Tensor]) -> None:
    """Refuses weights, in our names, that are not exactly those of an architecture.

    Raises:
        UserError: A weight is missing, unknown, or has another shape than the config says; names it.
    """
    with torch.device("meta"):
        expected = build_tokenizer(config).state_dict()
    check_names("tokenizer weights", weights, expected)
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise UserError(
                f"tokenizer weights: {name} has shape {list(weight.shape)}, the config says "
                f"{list(expected[name].shape)}. Choose the matching preset or config."
            )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors as safetensors, contiguous and on the CPU."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path))
    # safetensors replaces the file by one that only its owner may read; in a shared folder others need it too.
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: The file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path, or run the step that writes it.")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Fetch or write it again.") from error
