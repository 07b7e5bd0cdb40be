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
from nemo_cosmos.tokenizer.statistics import Numbers, check_statistics


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


def normalise_latent(latent: torch.Tensor, mean: Numbers, std: Numbers) -> torch.Tensor:
    """Tokenizer output -> zero mean and unit variance.

    Args:
        latent: Float [..., C, T, H, W], from the video's start.
        mean: One number per channel, or per channel and latent frame, all of a channel together; of the frames as many
            as the latent has are taken from the start.
        std: The same.

    Raises:
        UserError: There are numbers of fewer frames than the latent has.

    Source: see `nemo_cosmos.tokenizer.statistics`.
    """
    return (latent - _spread_out(mean, latent)) / _spread_out(std, latent)


def denormalise_latent(latent: torch.Tensor, mean: Numbers, std: Numbers) -> torch.Tensor:
    """The inverse of `normalise_latent`."""
    return latent * _spread_out(std, latent) + _spread_out(mean, latent)


def _spread_out(numbers: Numbers, like: torch.Tensor) -> torch.Tensor:
    """[C, T or 1, 1, 1]."""
    num_channels, num_frames = like.shape[-4:-2]
    values_CT = torch.tensor(numbers, dtype=like.dtype, device=like.device).view(num_channels, -1)
    if 1 < values_CT.shape[1] < num_frames:
        expected = f"at most {values_CT.shape[1]}, of which there are statistics"
        raise user_error("latent frames", num_frames, expected, "Take a shorter video.")
    return values_CT[:, :num_frames, None, None]


class LatentDecoder:
    """Makes what training takes of a cache's samples.

    Args:
        root: The cache's folder.
        sources: Only these domains; None for all.
        with_actions: Only samples that carry actions, and give them.
        statistics: Mean and standard deviation to normalise continuous latents by, see `normalise_latent`; the cache's
            own when absent. A post-trained model needs those that its base was trained with.

    Raises:
        UserError: The cache is unfinished; or the statistics are not those of its latents.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        sources: tuple[str, ...] | None = None,
        with_actions: bool = False,
        statistics: tuple[Numbers, Numbers] | None = None,
    ) -> None:
        self.card = read_cache_card(root)
        if self.card.continuous:
            self._mean, self._std = statistics or (self.card.latent_mean, self.card.latent_std)
            num_channels, num_frames, *_ = self.card.latent_shape
            check_statistics(
                "latent statistics", self._mean, self._std, num_channels=num_channels, num_latent_frames=num_frames
            )
        self._sources, self._with_actions = sources, with_actions

    def takes(self, sample: LatentSample) -> bool:
        """Whether a sample is of a wanted domain and has what is asked for."""
        return (self._sources is None or sample.source in self._sources) and (
            sample.has_actions or not self._with_actions
        )

    def decode(self, sample: LatentSample, tensors: bytes) -> dict[str, torch.Tensor]:
        """Decodes one sample.

        Args:
            sample: What its JSON says.
            tensors: Its safetensors member.

        Returns:
            `latent` float32 [C, T, H, W], normalised, or of a discrete tokenizer `tokens` int32 [T, H, W], its indices;
            `text_emb` float32 [L, D]; `text_mask` bool [L]; `fps` float32 scalar; with actions also
            `actions` float32 [num_frames-1, ACTION_DIM].
        """
        stored = load_safetensors(tensors)
        item = {
            **self._latent(stored["latent"]),
            "text_emb": stored["text_emb"].float(),
            "text_mask": stored["text_mask"],
            "fps": torch.tensor(sample.fps, dtype=torch.float32),
        }
        if self._with_actions:
            item["actions"] = stored["actions"]
        return item

    def _latent(self, stored: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.card.continuous:
            return {"tokens": stored}
        return {"latent": normalise_latent(stored.float(), self._mean, self._std)}


class LatentDataset(torch.utils.data.Dataset):
    """The samples of one split of a latent cache.

    Args:
        root: The cache's folder.
        split: Which split.
        sources: As for `LatentDecoder`.
        with_actions: As for `LatentDecoder`.
        statistics: As for `LatentDecoder`.

    Raises:
        UserError: No sample passes, or as for `LatentDecoder`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split,
        sources: tuple[str, ...] | None = None,
        with_actions: bool = False,
        statistics: tuple[Numbers, Numbers] | None = None,
    ) -> None:
        self.root = Path(root)
        self._decoder = LatentDecoder(root, sources=sources, with_actions=with_actions, statistics=statistics)
        self.card = self._decoder.card
        shards = [TarShard(path) for path in sorted((Path(root) / split).glob("[!.]*.tar"))]
        self._places = [(shard, key) for shard in shards for key in shard.keys]
        if sources is not None or with_actions:  # else what a sample says of itself is read with it
            self._places = [place for place in self._places if self._decoder.takes(_described(*place))]
        if not self._places:
            raise UserError(
                f"{root}: no {split} sample passes sources={sources}, with_actions={with_actions}. "
                "Collect and curate such video first."
            )

    @property
    def keys(self) -> list[str]:
        """Keys of all samples; a key names a clip and where in it the window starts."""
        return [key for _, key in self._places]

    @property
    def samples(self) -> list[LatentSample]:
        """What all samples say of themselves, read now."""
        return [_described(*place) for place in self._places]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample, as `LatentDecoder.decode` gives it."""
        shard, key = self._places[index]
        return self._decoder.decode(_described(shard, key), shard.read(f"{key}.safetensors"))


def _described(shard: TarShard, key: str) -> LatentSample:
    return LatentSample.from_dict(json.loads(shard.read(f"{key}.json")))
