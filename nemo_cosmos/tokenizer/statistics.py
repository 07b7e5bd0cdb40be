"""The latents' statistics that a tokenizer comes with.

A causal tokenizer's first latent frame stands for one frame and each later one for several, so the published video
statistics differ from frame to frame: a latent is normalised by the numbers of as many frames as it has, counted from
the start. A picture, which is no video's beginning, has numbers of its own.

Source: `register_mean_std` of NVIDIA cosmos-predict1 `diffusion/module/pretrained_vae.py`; diffusers lays
`latents_mean` and `latents_std` of `AutoencoderKLCosmos` out in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.tokenizer.pickled import load_pt

VIDEO_FILE, IMAGE_FILE = "mean_std.pt", "image_mean_std.pt"
"""Beside published weights: a pair of tensors each."""

Numbers = tuple[float, ...]
"""One for each channel; or for each channel and latent frame, all of a channel together."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What latents are normalised by; None where it is not known."""

    mean: Numbers | None = None
    """Of videos."""
    std: Numbers | None = None
    image_mean: Numbers | None = None
    """Of pictures, per channel."""
    image_std: Numbers | None = None

    @classmethod
    def of_card(cls, card: CheckpointCard) -> LatentStatistics:
        """Takes them from a checkpoint's card."""
        return cls(
            mean=card.latent_mean,
            std=card.latent_std,
            image_mean=card.image_latent_mean,
            image_std=card.image_latent_std,
        )

    def card_fields(self) -> dict[str, Numbers | None]:
        """Fields of `CheckpointCard`."""
        return {
            "latent_mean": self.mean,
            "latent_std": self.std,
            "image_latent_mean": self.image_mean,
            "image_latent_std": self.image_std,
        }

    def of(self, num_latent_frames: int) -> tuple[Numbers, Numbers] | None:
        """Mean and standard deviation for whole latents of so many frames; None where they are not known.

        One frame is a picture's, where pictures have numbers of their own.
        """
        if num_latent_frames == 1 and self.image_mean is not None and self.image_std is not None:
            return self.image_mean, self.image_std
        return None if self.mean is None or self.std is None else (self.mean, self.std)


def check_statistics(name: str, mean: object, std: object, *, num_channels: int, num_latent_frames: int = 1) -> None:
    """Refuses numbers that no latent can be normalised by.

    Args:
        name: What errors call them.
        mean: What should be one number for each channel, or for each channel and latent frame.
        std: The same.
        num_channels: Of the latent.
        num_latent_frames: Of the longest latent that is to be normalised.

    Raises:
        UserError: There are too few numbers, or they are not finite, or a deviation is not above 0.
    """
    per_channel = [len(v) // num_channels if _are_numbers(v) else 0 for v in (mean, std)]
    whole = all(_are_numbers(v) and len(v) % num_channels == 0 for v in (mean, std))
    if not whole or per_channel[0] != per_channel[1] or per_channel[0] < 1 or min(std) <= 0:  # type: ignore[call-overload]
        got = [len(v) if isinstance(v, list | tuple) else v for v in (mean, std)]
        raise user_error(
            name,
            f"latent_mean, latent_std of lengths {got}",
            f"{num_channels} numbers each, or {num_channels} for each latent frame, those of latent_std above 0",
            "Give those of this tokenizer's latents.",
        )
    if 1 < per_channel[0] < num_latent_frames:
        raise user_error(
            name,
            f"statistics of {per_channel[0]} latent frames",
            f"at least {num_latent_frames}",
            "Take shorter videos, or statistics per channel alone.",
        )


def _are_numbers(values: object) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf") for v in values
    )


def read_published(folder: Path, num_channels: int) -> LatentStatistics:
    """Reads what stands beside published weights.

    Args:
        folder: With or without `mean_std.pt` and `image_mean_std.pt`.
        num_channels: Of the latent.

    Raises:
        UserError: A file is broken or of another architecture.
    """
    video, image = (_read_pair(folder / name, num_channels) for name in (VIDEO_FILE, IMAGE_FILE))
    return LatentStatistics(mean=video[0], std=video[1], image_mean=image[0], image_std=image[1])


def write_published(folder: Path, statistics: LatentStatistics, num_channels: int) -> None:
    """Writes what `read_published` reads, a file for what is known; in float32 where that holds every number."""
    pairs = {
        VIDEO_FILE: (statistics.mean, statistics.std),
        IMAGE_FILE: (statistics.image_mean, statistics.image_std),
    }
    for name, pair in pairs.items():
        if pair[0] is not None and pair[1] is not None:
            torch.save(tuple(_tensor(numbers).view(num_channels, -1) for numbers in pair), folder / name)


def _tensor(numbers: Numbers) -> Tensor:
    exact = torch.tensor(numbers, dtype=torch.float64)
    return exact.float() if torch.equal(exact.float().double(), exact) else exact


def _read_pair(path: Path, num_channels: int) -> tuple[Numbers, Numbers] | tuple[None, None]:
    if not path.is_file():
        return None, None
    pair = load_pt(path)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        raise UserError(f"{path}: expected a mean and a standard deviation. Fetch it again, or remove it.")
    mean, std = (tuple(x.flatten().tolist()) for x in pair)
    check_statistics(str(path), mean, std, num_channels=num_channels)
    return mean, std


def of_diffusers(values: Mapping[str, Any], num_channels: int) -> LatentStatistics:
    """Reads what a diffusers `config.json` has.

    Raises:
        UserError: The numbers are not those of so many channels.
    """
    mean, std = values.get("latents_mean"), values.get("latents_std")
    if mean is None or std is None:
        return LatentStatistics()
    check_statistics("latents_mean, latents_std", mean, std, num_channels=num_channels)
    return LatentStatistics(mean=tuple(mean), std=tuple(std))
