"""Tokenizers of others: diffusers folders, read and written, and the reference's weight files, written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, fingerprint
from nemo_cosmos.tokenizer.statistics import LatentStatistics

DIFFUSERS_CLASS = "AutoencoderKLCosmos"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def diffusers_config(config: TokenizerConfig, statistics: LatentStatistics | None = None) -> dict[str, Any]:
    """Returns the `config.json` that makes diffusers build the same architecture.

    Args:
        config: The architecture.
        statistics: Of the latents; diffusers has no place for those of pictures.

    Raises:
        UserError: diffusers has no such architecture.
    """
    names.check_in_diffusers(config)
    mean, std = (None, None) if statistics is None else (statistics.mean, statistics.std)
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


def save_diffusers(
    tensors: Mapping[str, Tensor],
    config: TokenizerConfig,
    folder: str | Path,
    statistics: LatentStatistics | None = None,
) -> None:
    """Writes a folder that `AutoencoderKLCosmos.from_pretrained` reads.

    Args:
        tensors: Weights under our names, in the dtype that they shall have.
        config: The architecture.
        folder: Where; an older one is replaced.
        statistics: See `diffusers_config`.

    Raises:
        UserError: diffusers has no such architecture, or a weight is missing or unknown.
    """
    values = diffusers_config(config, statistics)
    theirs = names.to_diffusers_names(tensors, config)
    with written_aside(folder) as aside:
        aside.mkdir()
        weights.write_tensors(aside / DIFFUSERS_WEIGHTS, theirs)
        write_json(aside / "config.json", values)


def from_diffusers(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalVideoTokenizer:
    """Reads a diffusers `AutoencoderKLCosmos` folder.

    Args:
        folder: Folder with `config.json` and weights as `read_diffusers_weights` takes them.
        dtype: Floating-point type of the weights in memory.

    Raises:
        UserError: A file is missing or broken, or holds another architecture.
    """
    config, tensors = _read_diffusers(Path(folder))
    return weights.build(config, tensors, dtype=dtype)


def fingerprint_of_diffusers(folder: str | Path) -> str:
    """Returns the fingerprint of the tokenizer that `from_diffusers` would give, without building it.

    Args:
        folder: As for `from_diffusers`.

    Raises:
        UserError: As for `from_diffusers`.
    """
    config, tensors = _read_diffusers(Path(folder))
    weights.check(config, tensors)
    return fingerprint(config, tensors)


def _read_diffusers(folder: Path) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """The architecture, and the weights under our names."""
    config = config_of_diffusers(read_json(folder / "config.json"))
    return config, names.from_diffusers_names(read_diffusers_weights(folder), config)


def is_diffusers(folder: Path) -> bool:
    """Tells whether a folder holds the weights of a diffusers model."""
    return any((folder / name).is_file() for name in (DIFFUSERS_WEIGHTS, f"{DIFFUSERS_WEIGHTS}.index.json"))


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


def save_reference(tensors: Mapping[str, Tensor], config: TokenizerConfig, path: str | Path) -> None:
    """Writes weights under the reference's names, with its constant buffers, as `.safetensors` or `.pt`.

    Args:
        tensors: Under our names, in the dtype that they shall have.
        config: The architecture.
        path: Where; the suffix tells the format.

    Raises:
        UserError: The suffix is another one, or a weight is missing or unknown.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise user_error("reference weights", path.name, "a .pt or .safetensors file", "Give one of these.")
    theirs = names.to_reference_names(tensors, config)
    with written_aside(path) as aside:
        if path.suffix == ".pt":
            torch.save(theirs, aside)
        else:
            weights.write_tensors(aside, theirs)
