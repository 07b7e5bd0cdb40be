"""The latent cache: tokenizer output, text states and conditions, written once and read by every training run.

`nemo_cosmos.data.latent_writer` writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors

from nemo_cosmos.contracts import LatentCacheCard, LatentSample, Split
from nemo_cosmos.data.curated import SINGLE_VIEW
from nemo_cosmos.data.tar_shard import TarShard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json


@dataclass(frozen=True, kw_only=True)
class LatentCacheConfig:
    """What is cut from each clip."""

    num_frames: int = 17
    """Frames per sample; 1 + 8k for the 8x8x8 tokenizers."""
    height: int = 128
    """Pixels."""
    width: int = 128
    """Pixels."""
    window_stride: int = 8
    """Frames between the starts of two samples of a clip."""
    batch_size: int = 8
    """Samples encoded at once."""
    views: tuple[str, ...] | None = SINGLE_VIEW
    """Only these cameras, where a clip has a camera's name; None for all."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        for name in ("num_frames", "height", "width", "window_stride", "batch_size"):
            if getattr(self, name) < 1:
                raise user_error(name, getattr(self, name), "a positive number", "Correct the configuration.")


def cache_card(root: str | Path) -> Path:
    """Path of the card that a finished cache has."""
    return Path(root) / "cache.json"


def require_continuous(card: LatentCacheCard) -> None:
    """Refuses a cache of indices.

    Raises:
        UserError: The cache was written by a discrete tokenizer.
    """
    if not card.continuous:
        raise user_error(
            "latent cache",
            f"indices of the discrete tokenizer {card.tokenizer}",
            "continuous latents",
            "Write another cache with a CV tokenizer.",
        )


def read_cache_card(root: str | Path) -> LatentCacheCard:
    """Reads `cache.json`.

    Raises:
        UserError: The cache is missing or not finished.
    """
    path = cache_card(root)
    if not path.exists():
        raise UserError(
            f"{root}: no finished latent cache here. Run nemo-cosmos tokenize; it goes on where it stopped."
        )
    return LatentCacheCard.from_dict(read_json(path))


def normalise_latent(
    latent: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    """Tokenizer output [..., C, T, H, W] -> zero mean and unit variance per channel."""
    return (latent - _per_channel(mean, latent)) / _per_channel(std, latent)


def denormalise_latent(
    latent: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    """The inverse of `normalise_latent`."""
    return latent * _per_channel(std, latent) + _per_channel(mean, latent)


def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """[C, 1 or T, 1, 1], from values per channel, or per channel and frame as the published tokenizer has them."""
    table = torch.tensor(values, dtype=like.dtype, device=like.device).view(like.shape[-4], -1, 1, 1)
    return table if table.shape[1] == 1 else table[:, : like.shape[-3]]


class LatentDataset(torch.utils.data.Dataset):
    """The samples of one split of a continuous latent cache.

    Args:
        root: The cache's folder.
        split: Which split.
        sources: Only these domains; None for all.
        with_actions: Only samples that carry actions, and give them.
        statistics: Per-channel mean and standard deviation to normalise by; the cache's own when absent. A
            post-trained model needs those that its base was trained with.

    Raises:
        UserError: The cache is unfinished, holds indices of a discrete tokenizer, or no sample passes.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split,
        sources: tuple[str, ...] | None = None,
        with_actions: bool = False,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        self.card = read_cache_card(root)
        require_continuous(self.card)
        self._mean, self._std = statistics or (self.card.latent_mean, self.card.latent_std)
        self._with_actions = with_actions
        self.samples: list[LatentSample] = []
        self._places: list[tuple[TarShard, str]] = []
        for path in sorted((Path(root) / split).glob("[!.]*.tar")):
            shard = TarShard(path)
            for key in shard.keys:
                sample = LatentSample.from_dict(json.loads(shard.read(f"{key}.json")))
                if (sources is None or sample.source in sources) and (sample.has_actions or not with_actions):
                    self.samples.append(sample)
                    self._places.append((shard, key))
        if not self.samples:
            raise UserError(
                f"{root}: no {split} sample passes sources={sources}, with_actions={with_actions}. "
                "Collect and curate such video first."
            )

    def _tensors(self, index: int) -> dict[str, torch.Tensor]:
        shard, key = self._places[index]
        return load_safetensors(shard.read(f"{key}.safetensors"))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample.

        Returns:
            `latent` float32 [C, T, H, W], normalised per channel; `text_emb` float32 [L, D]; `text_mask` bool [L];
            `fps` float32 scalar; with actions also `actions` float32 [num_frames-1, ACTION_DIM].
        """
        tensors = self._tensors(index)
        item = {
            "latent": normalise_latent(tensors["latent"].float(), self._mean, self._std),
            "text_emb": tensors["text_emb"].float(),
            "text_mask": tensors["text_mask"],
            "fps": torch.tensor(self.samples[index].fps, dtype=torch.float32),
        }
        if self._with_actions:
            item["actions"] = tensors["actions"]
        return item
