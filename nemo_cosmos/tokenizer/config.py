"""Architecture of a tokenizer as plain values, with the published sizes as presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from nemo_cosmos.errors import user_error

PatchMethod = Literal["haar", "rearrange"]
Modality = Literal["video", "image"]

IMAGE_NORM_GROUPS = 32
"""Groups of the image networks' group norms."""

_LATER_FIELDS = ("modality", "decoder_channels_mult", "z_channels", "levels")
"""Fields that `to_dict` leaves out at their defaults: fingerprints are taken over it, and older ones must hold."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a tokenizer of one of four families: continuous or discrete (C, D), of images or videos (I, V).

    The released models give attention to the middle block only: the level attention of the reference is asked for at
    resolution 32, which none of its nominal level resolutions (1024 / patch_size / 2^level) ever reaches. So there is
    no field for it. Nor is there one for `z_factor`, which is 1 in all of them: no latent is sampled.

    Source: arXiv 2501.03575 section 4; released configurations of Cosmos-Tokenizer and Cosmos-Tokenize1.
    """

    modality: Modality = "video"
    """`video` for causal networks over frames, `image` for two-dimensional ones."""
    in_channels: int = 3
    """Colour channels of the picture."""
    channels: int = 128
    """Width after the first convolution."""
    channels_mult: tuple[int, ...] = (2, 4, 4)
    """Width of each level over `channels`, from fine to coarse; at least two levels."""
    decoder_channels_mult: tuple[int, ...] | None = None
    """As `channels_mult`, of a decoder with other levels; None for the same. Only the first CV4x8x8 has its own."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; decoder levels hold one more."""
    latent_channels: int = 16
    """Channels of the latent; of a discrete one the dimensions of its code, one for each of `levels`."""
    z_channels: int | None = None
    """Channels that the encoder gives and the decoder takes; None for as many as the latent has."""
    levels: tuple[int, ...] | None = None
    """Quantisation levels of each dimension of the code, at least 2; None for a continuous latent."""
    patch_size: int = 4
    """Edge in samples of the patch (time, height, width) that the wavelet folds into channels; a power of two."""
    patch_method: PatchMethod = "haar"
    """`haar` wavelet bands, or `rearrange` for plain space-to-depth."""
    spatial_compression: int = 8
    """Pixels per latent cell along height and width; a power of two, at least `patch_size`."""
    temporal_compression: int = 8
    """Frames per latent frame after the first one; a power of two, at least `patch_size`; 1 for images."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A value is out of range, or the levels are too few for the compression.
        """
        for name, choices in (("modality", get_args(Modality)), ("patch_method", get_args(PatchMethod))):
            if getattr(self, name) not in choices:
                raise user_error(name, getattr(self, name), f"one of {choices}", "Correct the tokenizer config.")
        for name in ("in_channels", "channels", "num_res_blocks", "latent_channels", "z_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise user_error(name, value, "a positive integer", "Correct the tokenizer config.")
        for name in ("channels_mult", "decoder_channels_mult"):
            value = getattr(self, name)
            if value is not None and (len(value) < 2 or min(value) < 1):
                raise user_error(name, value, "two or more positive factors", "Correct the tokenizer config.")
        if self.levels is not None and (len(self.levels) != self.latent_channels or min(self.levels) < 2):
            raise user_error(
                "levels",
                self.levels,
                f"latent_channels {self.latent_channels} numbers of at least 2",
                "Correct the tokenizer config.",
            )
        self._check_compression()
        if self.modality == "image":
            self._check_image()

    def _check_compression(self) -> None:
        axes = ("spatial_compression", "temporal_compression") if self.modality == "video" else ("spatial_compression",)
        for name in ("patch_size", *axes):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise user_error(name, value, "a power of two", "Correct the tokenizer config.")
        # The coarsest level of a video network never resamples; an image network's does.
        most = self.patch_size * 2 ** (self.num_levels - (self.modality == "video"))
        for name in axes:
            if not self.patch_size <= getattr(self, name) <= most:
                raise user_error(
                    name,
                    getattr(self, name),
                    f"between patch_size {self.patch_size} and {most} with {self.num_levels} levels",
                    "Change it, patch_size, or the number of levels in channels_mult.",
                )
        self._check_decoder()

    def _check_decoder(self) -> None:
        """Refuses what the decoder's rule (`decoder.up_axes`) would not bring back to full size."""
        num_space, num_time = self.num_spatial_levels, self.num_temporal_levels
        if num_time > num_space:
            raise user_error(
                "temporal_compression",
                self.temporal_compression,
                f"at most spatial_compression {self.spatial_compression}",
                "The decoder doubles space wherever it doubles time.",
            )
        # Where time is compressed as much as space, a video's decoder begins one level late.
        needed = num_space if self.modality == "image" else 1 + max(num_space, num_time + 1)
        if self.num_decoder_levels < needed:
            raise user_error(
                "levels of the decoder",
                self.num_decoder_levels,
                f"at least {needed} for this compression",
                "Add levels to channels_mult, or enlarge patch_size.",
            )

    def _check_image(self) -> None:
        if self.temporal_compression != 1:
            raise user_error(
                "temporal_compression", self.temporal_compression, "1 for images", "Correct the tokenizer config."
            )
        if self.channels % IMAGE_NORM_GROUPS:
            raise user_error(
                "channels",
                self.channels,
                f"a multiple of the {IMAGE_NORM_GROUPS} groups that image networks norm in",
                "Correct the tokenizer config.",
            )

    @property
    def family(self) -> str:
        """`CV`, `DV`, `CI` or `DI`."""
        return ("C" if self.levels is None else "D") + ("V" if self.modality == "video" else "I")

    @property
    def vocab_size(self) -> int | None:
        """Codes of a discrete latent; None of a continuous one."""
        return None if self.levels is None else math.prod(self.levels)

    @property
    def compression_name(self) -> str:
        """Family and compression as published names give them, such as `CV8x8x8` or `DI16x16`."""
        axes = [self.temporal_compression] if self.modality == "video" else []
        return self.family + "x".join(str(c) for c in (*axes, self.spatial_compression, self.spatial_compression))

    @property
    def num_z_channels(self) -> int:
        """Channels that the encoder gives and the decoder takes."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.channels_mult)

    @property
    def decoder_factors(self) -> tuple[int, ...]:
        """Width of each decoder level over `channels`, from fine to coarse."""
        return self.channels_mult if self.decoder_channels_mult is None else self.decoder_channels_mult

    @property
    def num_decoder_levels(self) -> int:
        """Number of resolution levels of the decoder."""
        return len(self.decoder_factors)

    @property
    def num_spatial_levels(self) -> int:
        """Levels that halve height and width, beyond what patching does."""
        return int(math.log2(self.spatial_compression // self.patch_size))

    @property
    def num_temporal_levels(self) -> int:
        """Levels that halve time, beyond what patching does; none for images."""
        if self.modality == "image":
            return 0
        return int(math.log2(self.temporal_compression // self.patch_size))

    @property
    def patch_channels(self) -> int:
        """Channels of the patched picture."""
        return self.in_channels * self.patch_size ** (3 if self.modality == "video" else 2)

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """Returns the shape of one picture's latent.

        Args:
            size: (frames, height, width) of a video or (height, width) of an image that fits the compression.

        Returns:
            (channels, frames, height, width) of a continuous latent, without frames for an image and without channels
            for indices.
        """
        *frames, height, width = size
        grid = (
            *(1 + (num_frames - 1) // self.temporal_compression for num_frames in frames),
            height // self.spatial_compression,
            width // self.spatial_compression,
        )
        return (self.latent_channels, *grid) if self.levels is None else grid

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, those of `_LATER_FIELDS` only where they are not the default."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _LATER_FIELDS or value != field.default:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from what `to_dict` gave.

        Raises:
            UserError: A field is unknown.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise user_error("tokenizer config", unknown, "only known fields", "Remove these fields.")
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | tuples)


def _video(
    temporal: int, spatial: int, *, patch_size: int, z_channels: int = 16, discrete: bool = False
) -> TokenizerConfig:
    return TokenizerConfig(
        temporal_compression=temporal,
        spatial_compression=spatial,
        patch_size=patch_size,
        **_discrete(z_channels) if discrete else {},
    )


def _image(spatial: int, *, patch_size: int, discrete: bool = False) -> TokenizerConfig:
    return TokenizerConfig(
        modality="image",
        temporal_compression=1,
        spatial_compression=spatial,
        patch_size=patch_size,
        **_discrete(256) if discrete else {},
    )


def _discrete(z_channels: int) -> dict[str, Any]:
    """The codebook of 64,000 that all published discrete tokenizers have."""
    return {"levels": (8, 8, 8, 5, 5, 5), "latent_channels": 6, "z_channels": z_channels}


_TINY: dict[str, Any] = {"channels": 64, "channels_mult": (1, 2), "num_res_blocks": 1, "patch_size": 8}
_TINY_DISCRETE_VIDEO: dict[str, Any] = {
    "channels": 32,
    "channels_mult": (1, 2, 4),
    "num_res_blocks": 1,
    "levels": (8, 8, 8, 8),
    "latent_channels": 4,
    "z_channels": 16,
}
"""4,096 codes: the embedding of 64,000 would be most of a small transformer. The smaller patch spares the seven million
weights that the last convolution has at a patch of 8."""

_FIRST: dict[str, TokenizerConfig] = {
    "CI8x8": _image(8, patch_size=4),
    "CI16x16": _image(16, patch_size=4),
    "DI8x8": _image(8, patch_size=4, discrete=True),
    "DI16x16": _image(16, patch_size=4, discrete=True),
    "CV4x8x8": dataclasses.replace(_video(4, 8, patch_size=4), decoder_channels_mult=(2, 4)),
    "CV8x8x8": _video(8, 8, patch_size=4),
    "CV8x16x16": _video(8, 16, patch_size=4),
    "DV4x8x8": _video(4, 8, patch_size=4, discrete=True),
    "DV8x8x8": _video(8, 8, patch_size=4, discrete=True),
    "DV8x16x16": _video(8, 16, patch_size=4, discrete=True),
}
"""Architectures of the 0.1 and 1.0 releases, which all share one patch size."""

_TOKENIZE1: dict[str, TokenizerConfig] = {
    "CI8x8-360p": _image(8, patch_size=2),
    "CI16x16-360p": _image(16, patch_size=2),
    "DI8x8-360p": _image(8, patch_size=2, discrete=True),
    "DI16x16-360p": _image(16, patch_size=2, discrete=True),
    "CV4x8x8-360p": _video(4, 8, patch_size=2),
    "CV8x8x8-720p": _video(8, 8, patch_size=4),
    "DV4x8x8-360p": _video(4, 8, patch_size=2, discrete=True, z_channels=256),
    "DV8x16x16-720p": _video(8, 16, patch_size=4, discrete=True),
}
"""Architectures of the Tokenize1 release."""

PRESETS: dict[str, TokenizerConfig] = {
    **_FIRST,
    **_TOKENIZE1,
    "CV8x8x8-tiny": TokenizerConfig(**_TINY),
    "DV8x8x8-tiny": TokenizerConfig(**_TINY_DISCRETE_VIDEO),
    "CI8x8-tiny": TokenizerConfig(**_TINY, modality="image", temporal_compression=1),
    "DI8x8-tiny": TokenizerConfig(**_TINY, **_discrete(16), modality="image", temporal_compression=1),
}
"""Known architectures by name: family, temporal and spatial compression, training resolution or size."""

RELEASED: dict[str, str] = {
    **{f"Cosmos-Tokenizer-{name}": name for name in _FIRST},
    **{f"Cosmos-0.1-Tokenizer-{name}": name for name in _FIRST},
    **{f"Cosmos-1.0-Tokenizer-{name}": name for name in ("CV8x8x8", "DV8x16x16")},
    **{f"Cosmos-Tokenize1-{name}": name for name in _TOKENIZE1},
}
"""Name of each published repository -> name of its preset."""


def preset(name: str) -> TokenizerConfig:
    """Returns the architecture called `name`, by a name of `PRESETS` or of a published repository (`RELEASED`).

    Raises:
        UserError: No preset has that name.
    """
    key = RELEASED.get(name.removeprefix("nvidia/"), name)
    if key not in PRESETS:
        raise user_error("tokenizer preset", name, f"one of {sorted(PRESETS)}", "Choose one of these.")
    return PRESETS[key]
