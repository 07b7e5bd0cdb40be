"""Architecture of a tokenizer as plain values, with the published sizes as presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from nemo_cosmos.errors import user_error

PatchMethod = Literal["haar", "rearrange"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a causal continuous-video (CV) tokenizer.

    The released models give attention to the middle block only: the level attention of the reference is asked for at
    resolution 32, which none of its nominal level resolutions (1024 / patch_size / 2^level) ever reaches. So there is
    no field for it.

    Source: arXiv 2501.03575 section 4; released configurations of Cosmos-Tokenize1.
    """

    in_channels: int = 3
    """Colour channels of the video."""
    channels: int = 128
    """Width after the first convolution."""
    channels_mult: tuple[int, ...] = (2, 4, 4)
    """Width of each level over `channels`, from fine to coarse; at least two levels."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; decoder levels hold one more."""
    latent_channels: int = 16
    """Channels of the latent."""
    patch_size: int = 4
    """Edge in samples of the patch (time, height, width) that the wavelet folds into channels; a power of two."""
    patch_method: PatchMethod = "haar"
    """`haar` wavelet bands, or `rearrange` for plain space-to-depth."""
    spatial_compression: int = 8
    """Pixels per latent cell along height and width; a power of two, at least `patch_size`."""
    temporal_compression: int = 8
    """Frames per latent frame after the first one; a power of two, at least `patch_size`."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A value is out of range, or the levels are too few for the compression.
        """
        for name in ("in_channels", "channels", "num_res_blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise user_error(name, getattr(self, name), "a positive integer", "Correct the tokenizer config.")
        if len(self.channels_mult) < 2 or min(self.channels_mult) < 1:
            raise user_error(
                "channels_mult", self.channels_mult, "two or more positive factors", "Correct the tokenizer config."
            )
        if self.patch_method not in ("haar", "rearrange"):
            raise user_error(
                "patch_method", self.patch_method, "'haar' or 'rearrange'", "Correct the tokenizer config."
            )
        self._check_compression()

    def _check_compression(self) -> None:
        for name in ("patch_size", "spatial_compression", "temporal_compression"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise user_error(name, value, "a power of two", "Correct the tokenizer config.")
        most = self.patch_size * 2 ** (self.num_levels - 1)
        for name in ("spatial_compression", "temporal_compression"):
            if not self.patch_size <= getattr(self, name) <= most:
                raise user_error(
                    name,
                    getattr(self, name),
                    f"between patch_size {self.patch_size} and {most} with {self.num_levels} levels",
                    "Change it, patch_size, or the number of levels in channels_mult.",
                )

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.channels_mult)

    @property
    def num_spatial_levels(self) -> int:
        """Levels that halve height and width, beyond what patching does."""
        return int(math.log2(self.spatial_compression // self.patch_size))

    @property
    def num_temporal_levels(self) -> int:
        """Levels that halve time, beyond what patching does."""
        return int(math.log2(self.temporal_compression // self.patch_size))

    @property
    def patch_channels(self) -> int:
        """Channels of the patched video."""
        return self.in_channels * self.patch_size**3

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the latent's (channels, frames, height, width) for a video that fits the compression."""
        return (
            self.latent_channels,
            1 + (num_frames - 1) // self.temporal_compression,
            height // self.spatial_compression,
            width // self.spatial_compression,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self) | {"channels_mult": list(self.channels_mult)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from what `to_dict` gave.

        Raises:
            UserError: A field is unknown.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise user_error("tokenizer config", unknown, "only known fields", "Remove these fields.")
        return cls(**values | {"channels_mult": tuple(values.get("channels_mult", cls.channels_mult))})


PRESETS: dict[str, TokenizerConfig] = {
    "CV8x8x8-720p": TokenizerConfig(),
    "CV8x8x8-tiny": TokenizerConfig(channels=64, channels_mult=(1, 2), num_res_blocks=1, patch_size=8),
}
"""Known architectures by name: family, temporal and spatial compression, training resolution or size."""


def preset(name: str) -> TokenizerConfig:
    """Returns the architecture called `name`.

    Raises:
        UserError: No preset has that name.
    """
    if name not in PRESETS:
        raise user_error("tokenizer preset", name, f"one of {sorted(PRESETS)}", "Choose one of these.")
    return PRESETS[name]
