"""Reading and writing tokenizers of others: diffusers folders and the reference's weight files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, Tokenizer

DIFFUSERS_CLASS = "AutoencoderKLCosmos"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


Statistics = tuple[float, ...] | None


def diffusers_config(config: TokenizerConfig, mean: Statistics = None, std: Statistics = None) -> dict[str, Any]:
    """Returns the `config.json` that makes diffusers build the same architecture.

    Args:
        config: The architecture.
        mean: The latents' mean per channel, where known.
        std: Their standard deviation.

    Raises:
        UserError: diffusers has no such architecture.
    """
    names.check_in_diffusers(config)
    widths, decoder_widths = (
        [config.channels * factor for factor in factors] for factors in (config.channels_mult, config.decoder_factors)
    )
    return {
        "_class_name": DIFFUSERS_CLASS,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": [config.channels, *widths],
        "decode_block_out_channels": [*decoder_widths, decoder_widths[-1]],
        "attention_resolutions": [],
        "num_layers": config.num_res_blocks,
        "patch_size": config.patch_size,
        "patch_type": config.patch_method,
        "spatial_compression_ratio": config.spatial_compression,
        "temporal_compression_ratio": config.temporal_compression,
        "scaling_factor": 1.0,
        "latents_mean": None if mean is None else list(mean),
        "latents_std": None if std is None else list(std),
    }


def config_of_diffusers(values: Mapping[str, Any]) -> TokenizerConfig:
    """Reads the architecture out of a diffusers `config.json`; absent fields have diffusers' defaults.

    Raises:
        UserError: It is another class, or an architecture that the Cosmos tokenizers do not have.
    """
    if values.get("_class_name") != DIFFUSERS_CLASS:
        raise user_error("_class_name", values.get("_class_name"), DIFFUSERS_CLASS, "Give the `vae` folder of Cosmos.")
    channels, *widths = values.get("encoder_block_out_channels", (128, 256, 512, 512))
    *decoder_widths, _ = values.get("decode_block_out_channels", (*widths, widths[-1]))
    factors = _factors("encoder_block_out_channels", widths, channels)
    decoder_factors = _factors("decode_block_out_channels", decoder_widths, channels)
    config = TokenizerConfig(
        in_channels=values.get("in_channels", 3),
        channels=channels,
        channels_mult=factors,
        decoder_channels_mult=None if decoder_factors == factors else decoder_factors,
        num_res_blocks=values.get("num_layers", 2),
        latent_channels=values.get("latent_channels", 16),
        patch_size=values.get("patch_size", 4),
        patch_method=values.get("patch_type", "haar"),
        spatial_compression=values.get("spatial_compression_ratio", 8),
        temporal_compression=values.get("temporal_compression_ratio", 8),
    )
    _check_diffusers_rest(config, values)
    return config


def _factors(key: str, widths: Sequence[int], channels: int) -> tuple[int, ...]:
    if any(width % channels for width in widths):
        raise user_error(key, widths, f"multiples of {channels}", "This architecture is not a Cosmos tokenizer's.")
    return tuple(width // channels for width in widths)


def statistics_of_diffusers(
    values: Mapping[str, Any], config: TokenizerConfig
) -> tuple[Statistics, Statistics, tuple[str, ...]]:
    """Reads the latents' statistics out of a diffusers `config.json`.

    Returns:
        Mean and standard deviation per channel, and what cannot be kept: the published VAE has numbers per channel and
        frame, of which no one number per channel is right.
    """
    mean, std = values.get("latents_mean"), values.get("latents_std")
    if mean is None or std is None:
        return None, None, ()
    if not all(isinstance(v, list) and len(v) == config.latent_channels for v in (mean, std)):
        return None, None, ("latents_mean, latents_std (not one number per channel)",)
    return tuple(mean), tuple(std), ()


def _check_diffusers_rest(config: TokenizerConfig, values: Mapping[str, Any]) -> None:
    """Refuses what diffusers can express and a Cosmos tokenizer cannot."""
    ours = diffusers_config(config)
    for key in ("encoder_block_out_channels", "decode_block_out_channels", "out_channels"):
        if key in values and values[key] != ours[key] and list(values[key]) != ours[key]:
            raise user_error(key, values[key], f"{ours[key]}", "This architecture is not a Cosmos tokenizer's.")
    levels = {values.get("resolution", 1024) // config.patch_size // 2**level for level in range(config.num_levels)}
    attending = sorted(levels & set(values.get("attention_resolutions", (32,))))
    if attending:
        raise user_error(
            "attention_resolutions", attending, "none of the levels' own", "No Cosmos tokenizer has these."
        )


def to_diffusers(tokenizer: CausalVideoTokenizer, folder: str | Path) -> Path:
    """Writes a folder that `AutoencoderKLCosmos.from_pretrained` reads.

    Args:
        tokenizer: What to write, in the dtype that it has.
        folder: Where; an older one is replaced.

    Returns:
        The folder.
    """
    folder, config = Path(folder), tokenizer.tokenizer_config
    with written_aside(folder) as aside:
        aside.mkdir()
        weights.write_tensors(aside / DIFFUSERS_WEIGHTS, names.to_diffusers_names(tokenizer.state_dict(), config))
        write_json(aside / "config.json", diffusers_config(config))
    return folder


def from_diffusers(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalVideoTokenizer:
    """Reads a diffusers `AutoencoderKLCosmos` folder.

    Args:
        folder: Folder with `config.json` and weights as `read_diffusers_weights` takes them.
        dtype: Floating-point type of the weights in memory.

    Raises:
        UserError: A file is missing or broken, or holds another architecture.
    """
    folder = Path(folder)
    config = config_of_diffusers(read_json(folder / "config.json"))
    theirs = read_diffusers_weights(folder)
    return weights.build(config, names.from_diffusers_names(theirs, config), dtype=dtype)


def read_diffusers_weights(folder: Path) -> dict[str, Tensor]:
    """Reads `diffusion_pytorch_model.safetensors`, or the files that its `.index.json` lists.

    Raises:
        UserError: A file is missing or broken.
    """
    index = folder / f"{DIFFUSERS_WEIGHTS}.index.json"
    files = set(read_json(index)["weight_map"].values()) if index.exists() else {DIFFUSERS_WEIGHTS}
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        tensors |= weights.read_tensors(folder / name)
    return tensors


def save_reference(tokenizer: Tokenizer, path: str | Path) -> Path:
    """Writes the weights under the reference's names, with its constant buffers, as `.safetensors` or `.pt`.

    Raises:
        UserError: The suffix is another one.
    """
    path = Path(path)
    _check_suffix(path)
    tensors = names.to_reference_names(tokenizer.state_dict(), tokenizer.tokenizer_config)
    with written_aside(path) as aside:
        if path.suffix == ".pt":
            torch.save(tensors, aside)
        else:
            weights.write_tensors(aside, tensors)
    return path


def load_reference(path: str | Path, config: TokenizerConfig, *, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Reads weights in the reference's names.

    Args:
        path: `.safetensors`, or a `.pt` of plain tensors; pickled code is never run.
        config: The architecture, for the file does not tell it.
        dtype: Floating-point type of the weights in memory.

    Raises:
        UserError: The file is missing, broken, holds more than tensors, or belongs to another architecture.
    """
    path = Path(path)
    _check_suffix(path)
    tensors = read_pt(path) if path.suffix == ".pt" else weights.read_tensors(path)
    return weights.build(config, names.from_reference_names(tensors, config), dtype=dtype)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".pt", ".safetensors"):
        raise user_error("reference weights", path.name, "a .pt or .safetensors file", "Give one of these.")


def load_pt(path: Path) -> Any:  # noqa: ANN401 - whatever plain containers the file holds
    """Reads a `.pt` file of tensors in plain containers; pickled code is never run.

    Raises:
        UserError: The file is missing, broken, or holds other objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises whatever it stumbles over
        raise UserError(
            f"{path}: not a file of plain tensors ({error}). Pickled objects are not run; convert it to safetensors."
        ) from error


def read_pt(path: Path) -> dict[str, Tensor]:
    """Reads a state dict: a `.pt` file of tensors by name, or one of the reference's training checkpoints.

    Of the latter the averaged weights are taken, as the published `.jit` files hold them, and the trained ones where
    there are no averages.

    Raises:
        UserError: The file is missing, broken, or holds more than tensors.
    """
    tensors = load_pt(path)
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = _trained(tensors["model"])
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors by name. Save the model's `state_dict()`.")
    return tensors


def _trained(model: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the network's own names; the averages stand under theirs with `-` for every dot."""
    averages = {
        name.removeprefix("ema.").replace("-", "."): weight for name, weight in model.items() if name.startswith("ema.")
    }
    weights = {name: weight for name, weight in model.items() if not name.startswith("ema.")} | averages
    return {name.removeprefix("network."): weight for name, weight in weights.items()}
