"""The latent cache: tokenizer output, text states and conditions, written once and read by every training run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tqdm import tqdm

from nemo_cosmos.contracts import ClipRecord, LatentCacheCard, LatentSample, Split
from nemo_cosmos.data.curated import SINGLE_VIEW, CuratedClips, caption_at, windows_of
from nemo_cosmos.data.tar_shard import TarShard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.video_io import to_model

if TYPE_CHECKING:
    from nemo_cosmos.text import TextEncoder

_SPLITS: tuple[Split, ...] = ("train", "heldout")
_TEXTS_KEPT = 32
"""Captions whose states a writer holds in memory."""


class LatentTokenizer(Protocol):
    """What the cache needs of a tokenizer."""

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] -> latent [B, C, T, H, W]."""

    def fingerprint(self) -> str:
        """SHA-256 over config and weights."""


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


def write_latent_cache(
    curated: str | Path,
    output: str | Path,
    *,
    tokenizer: LatentTokenizer,
    tokenizer_name: str,
    text_encoder: TextEncoder,
    config: LatentCacheConfig,
    worker: int = 0,
    num_workers: int = 1,
) -> LatentCacheCard | None:
    """Encodes a curated folder, shard by shard; shards that are already there are left alone.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        tokenizer: A continuous tokenizer, on this rank's device.
        tokenizer_name: Its preset's name, for the card.
        text_encoder: Encodes the captions.
        config: What to cut.
        worker: This process's number, in an array job.
        num_workers: Size of the array; worker w takes every `num_workers`-th shard.

    Returns:
        The card, written by whichever worker finds all shards done; None when others are still at work.

    Raises:
        UserError: `output` belongs to another tokenizer or configuration, or no clip is long enough.
    """
    output = Path(output)
    fingerprint = tokenizer.fingerprint()
    _claim(output, fingerprint, config, text_encoder.config.name)
    tasks = [(split, clips, name) for split, clips in _splits_of(curated, config) for name in clips.shard_names()]
    ours = tasks[worker::num_workers]
    with tqdm(
        total=sum(len(clips.of_shard(name)) for _, clips, name in ours), desc="tokenize", unit="clip"
    ) as progress:
        writer = _ShardWriter(tokenizer, text_encoder, config, progress)
        for split, clips, name in ours:
            tar_path = output / split / (name.removesuffix(".tar").replace("/", "__") + ".tar")
            if _stats_path(tar_path).exists():
                progress.update(len(clips.of_shard(name)))
            else:
                writer.write(clips, name, tar_path)
    tar_paths = [output / split / (name.removesuffix(".tar").replace("/", "__") + ".tar") for split, _, name in tasks]
    if not all(_stats_path(path).exists() for path in tar_paths):
        return None
    return _finish(output, tar_paths, fingerprint, tokenizer_name, text_encoder, config)


def _splits_of(curated: str | Path, config: LatentCacheConfig) -> Iterator[tuple[Split, CuratedClips]]:
    everything = CuratedClips(curated, views=config.views)
    for split in _SPLITS:
        if any(record.split == split for record in everything.records):
            yield split, CuratedClips(curated, split=split, views=config.views)


def _claim(output: Path, fingerprint: str, config: LatentCacheConfig, text_encoder: str) -> None:
    """Marks an empty folder as ours, or checks that it already is."""
    values = json.loads(json.dumps(asdict(config)))
    values.pop("batch_size")
    mark = {"tokenizer_fingerprint": fingerprint, "config": values, "text_encoder": text_encoder}
    path = output / "writer.json"
    if not path.exists():
        write_json(path, mark)
    elif (found := read_json(path)) != mark:
        raise UserError(
            f"{output}: this latent cache was begun with {found}, but now it would be {mark}. "
            "Give another output folder, or delete this one."
        )


def _stats_path(tar_path: Path) -> Path:
    return tar_path.with_suffix(".json")


class _ShardWriter:
    """Encodes the windows of one curated shard into one tar, with the latent's sums beside it."""

    def __init__(
        self, tokenizer: LatentTokenizer, text_encoder: TextEncoder, config: LatentCacheConfig, progress: tqdm
    ) -> None:
        self._progress = progress
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._config = config
        # Windows of one clip stand together and share captions; T5 states take 1 MB each, so only the latest are kept.
        self._text = lru_cache(maxsize=_TEXTS_KEPT)(self._encode_text)

    def write(self, clips: CuratedClips, name: str, tar_path: Path) -> None:
        import webdataset

        stats = _Moments()
        with written_aside(tar_path) as aside, webdataset.TarWriter(str(aside), mtime=0.0) as tar:
            for samples, frames in self._batches(clips, name):
                video = torch.stack([to_model(f) for f in frames]).to(current_device())
                with torch.inference_mode():
                    latents = self._tokenizer.encode(video).float().cpu()
                for sample, latent in zip(samples, latents, strict=True):
                    stats.add(latent)
                    tar.write(self._member(sample[0], sample[1], latent))
        write_json(_stats_path(tar_path), stats.to_dict())

    def _batches(
        self, clips: CuratedClips, name: str
    ) -> Iterator[tuple[list[tuple[LatentSample, ClipRecord]], list[np.ndarray]]]:
        config = self._config
        samples, frames = [], []
        for index in clips.of_shard(name):
            record = clips.records[index]
            starts = windows_of(record, num_frames=config.num_frames, stride=config.window_stride)
            pixels = clips.frames(index, height=config.height, width=config.width) if starts else None
            for start in starts:
                samples.append((_sample(record, start, config), record))
                frames.append(pixels[start : start + config.num_frames])
                if len(samples) == config.batch_size:
                    yield samples, frames
                    samples, frames = [], []
            self._progress.update()
        if samples:
            yield samples, frames

    def _encode_text(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        states, mask = self._text_encoder.encode([caption])
        return states[0].bfloat16(), mask[0]

    def _member(self, sample: LatentSample, record: ClipRecord, latent: torch.Tensor) -> dict[str, str | bytes]:
        text_emb, text_mask = self._text(sample.caption)
        tensors = {"latent": latent.bfloat16().contiguous(), "text_emb": text_emb, "text_mask": text_mask}
        start, stop = sample.start_frame, sample.start_frame + sample.num_frames
        conditions = record.conditions
        if conditions.actions is not None:
            tensors["actions"] = torch.tensor(conditions.actions[start : stop - 1], dtype=torch.float32)
        if conditions.camera_poses is not None:
            tensors["camera_poses"] = torch.tensor(conditions.camera_poses[start:stop], dtype=torch.float32)
        if conditions.intrinsics is not None:
            tensors["intrinsics"] = torch.tensor(conditions.intrinsics, dtype=torch.float32)
        return {
            "__key__": sample.key,
            "safetensors": save_safetensors(tensors),
            "json": json.dumps(sample.to_dict()).encode(),
        }


def _sample(record: ClipRecord, start: int, config: LatentCacheConfig) -> LatentSample:
    return LatentSample(
        key=f"{record.clip_id}-{start:05d}",
        clip_id=record.clip_id,
        source=record.source,
        rollout=record.rollout,
        split=record.split,
        start_frame=start,
        num_frames=config.num_frames,
        fps=record.fps,
        height=config.height,
        width=config.width,
        caption=caption_at(record, start, config.num_frames),
        view=record.conditions.view,
        has_actions=record.conditions.actions is not None,
    )


class _Moments:
    """Per-channel sum and sum of squares, in float64 so that merging is exact enough in any order."""

    def __init__(self) -> None:
        self.samples, self.values = 0, 0
        self.total = self.total_squared = np.zeros(0)
        self.shape: tuple[int, ...] = ()

    def add(self, latent_CTHW: torch.Tensor) -> None:
        flat = latent_CTHW.flatten(1).double().numpy()
        self.shape = tuple(latent_CTHW.shape)
        self.total = flat.sum(1) + (self.total if self.samples else 0)
        self.total_squared = (flat**2).sum(1) + (self.total_squared if self.samples else 0)
        self.samples += 1
        self.values += flat.shape[1]

    def to_dict(self) -> dict[str, object]:
        return {
            "samples": self.samples,
            "values": self.values,
            "shape": self.shape,
            "sum": self.total.tolist(),
            "sum_of_squares": self.total_squared.tolist(),
        }


def _finish(
    output: Path,
    tar_paths: list[Path],
    fingerprint: str,
    tokenizer_name: str,
    text_encoder: TextEncoder,
    config: LatentCacheConfig,
) -> LatentCacheCard:
    stats = [(path.parent.name, read_json(_stats_path(path))) for path in tar_paths]
    counts = {split: sum(s["samples"] for name, s in stats if name == split) for split in _SPLITS}
    train = [s for name, s in stats if name == "train" and s["samples"]]
    if not train:
        raise UserError(
            f"{output}: no training clip has {config.num_frames} frames. Curate longer clips, or lower num_frames."
        )
    values = sum(s["values"] for s in train)
    mean = np.sum([s["sum"] for s in train], axis=0) / values
    variance = np.sum([s["sum_of_squares"] for s in train], axis=0) / values - mean**2
    card = LatentCacheCard(
        tokenizer=tokenizer_name,
        tokenizer_fingerprint=fingerprint,
        continuous=True,
        latent_shape=tuple(train[0]["shape"]),
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(np.sqrt(variance).tolist()),
        text_encoder=text_encoder.config.name,
        text_dim=text_encoder.config.dim,
        text_length=text_encoder.config.max_length,
        num_samples=counts,
    )
    write_json(output / "cache.json", card.to_dict())
    return card


def read_cache_card(root: str | Path) -> LatentCacheCard:
    """Reads `cache.json`.

    Raises:
        UserError: The cache is missing or not finished.
    """
    path = Path(root) / "cache.json"
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
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


class LatentDataset(torch.utils.data.Dataset):
    """The samples of one split of a latent cache.

    Args:
        root: The cache's folder.
        split: Which split.
        sources: Only these domains; None for all.
        with_actions: Only samples that carry actions, and give them.
        statistics: Per-channel mean and standard deviation to normalise by; the cache's own when absent. A
            post-trained model needs those that its base was trained with.

    Raises:
        UserError: The cache is unfinished or no sample passes.
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
