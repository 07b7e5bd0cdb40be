"""Writing the latent cache, one curated shard at a time, by as many workers as there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from tqdm import tqdm

from nemo_cosmos.contracts import ClipRecord, LatentCacheCard, LatentSample, Split
from nemo_cosmos.data.curated import CuratedClips, caption_at, curated_shards, windows_of
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.text import TextEncoder, TextEncoderConfig
from nemo_cosmos.video_io import to_model

_SPLITS: tuple[Split, ...] = ("train", "heldout")
_TEXTS_KEPT = 32
"""Captions whose states a writer holds in memory."""


class LatentTokenizer(Protocol):
    """What the cache needs of a tokenizer."""

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] -> latent [B, C, T, H, W]."""


def begin_latent_cache(output: str | Path, fingerprint: str, config: LatentCacheConfig, text_encoder: str) -> None:
    """Marks an empty folder as the cache of one tokenizer and configuration, or checks that it already is.

    Args:
        output: Folder of the cache.
        fingerprint: The tokenizer's.
        config: What is cut from each clip.
        text_encoder: Name of the text encoder.

    Raises:
        UserError: The folder belongs to another tokenizer or configuration.
    """
    values = json.loads(json.dumps(asdict(config)))
    values.pop("batch_size")
    mark = {"tokenizer_fingerprint": fingerprint, "config": values, "text_encoder": text_encoder}
    path = Path(output) / "writer.json"
    if not path.exists():
        write_json(path, mark)
    elif (found := read_json(path)) != mark:
        raise UserError(
            f"{output}: this latent cache was begun with {found}, but now it would be {mark}. "
            "Give another output folder, or delete this one."
        )


def unwritten_shards(curated: str | Path, output: str | Path) -> list[str]:
    """Lists the curated shards that the cache lacks, named as by `curated_shards`.

    Raises:
        UserError: There is no curated shard at all.
    """
    return [name for name in curated_shards(curated) if not _mark_of(output, name).exists()]


class LatentWriter:
    """Encodes the windows of curated shards into shards of the cache.

    What a shard gives depends on that shard alone, and its mark is written last. So shards may be written by any worker
    in any order, and one that was interrupted is simply written again.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache, which `begin_latent_cache` has marked.
        tokenizer: A continuous tokenizer, on this rank's device.
        text_encoder: Encodes the captions.
        config: What to cut.
        progress: Show a bar that counts clips.
    """

    def __init__(
        self,
        curated: str | Path,
        output: str | Path,
        *,
        tokenizer: LatentTokenizer,
        text_encoder: TextEncoder,
        config: LatentCacheConfig,
        progress: bool = False,
    ) -> None:
        self._curated, self._output = Path(curated), Path(output)
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._config, self._progress = config, progress
        # Windows of one clip stand together and share captions; T5 states take 1 MB each, so only the latest are kept.
        self._text = lru_cache(maxsize=_TEXTS_KEPT)(self._encode_text)

    def write(self, shard: str) -> None:
        """Writes the latents of one curated shard, each split into a tar of its own.

        Args:
            shard: Its name, as by `curated_shards`.

        Raises:
            UserError: The shard is broken, or the disk is full.
        """
        moments = {}
        for split in _SPLITS:
            clips = CuratedClips(self._curated, split=split, views=self._config.views, shards=(shard,))
            if len(clips):
                moments[split] = self._write_split(clips, split, shard).to_dict()
        write_json(_mark_of(self._output, shard), moments)

    def _write_split(self, clips: CuratedClips, split: Split, shard: str) -> _Moments:
        import webdataset

        moments = _Moments()
        with (
            written_aside(_tar_of(self._output, split, shard)) as aside,
            webdataset.TarWriter(str(aside), mtime=0.0) as tar,
            tqdm(total=len(clips), desc=f"tokenize {split}", unit="clip", disable=not self._progress) as bar,
        ):
            for samples, frames in self._batches(clips, bar):
                video = torch.stack([to_model(f) for f in frames]).to(current_device())
                with torch.inference_mode():
                    latents = self._tokenizer.encode(video).float().cpu()
                for (sample, record), latent in zip(samples, latents, strict=True):
                    moments.add(latent)
                    tar.write(self._member(sample, record, latent))
        return moments

    def _batches(
        self, clips: CuratedClips, bar: tqdm
    ) -> Iterator[tuple[list[tuple[LatentSample, ClipRecord]], list[np.ndarray]]]:
        config = self._config
        samples, frames = [], []
        for index, record in enumerate(clips.records):
            starts = windows_of(record, num_frames=config.num_frames, stride=config.window_stride)
            pixels = clips.frames(index, height=config.height, width=config.width) if starts else None
            for start in starts:
                samples.append((_sample(record, start, config), record))
                frames.append(pixels[start : start + config.num_frames])
                if len(samples) == config.batch_size:
                    yield samples, frames
                    samples, frames = [], []
            bar.update()
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


def _tar_of(output: str | Path, split: Split, shard: str) -> Path:
    return Path(output) / split / shard.replace("/", "__")


def _mark_of(output: str | Path, shard: str) -> Path:
    """Path of the file that says the shard is done, with the latents' sums for each split."""
    return Path(output) / "shards" / (shard.removesuffix(".tar").replace("/", "__") + ".json")


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


def finish_latent_cache(
    curated: str | Path,
    output: str | Path,
    *,
    fingerprint: str,
    tokenizer_name: str,
    text_encoder: TextEncoderConfig,
    config: LatentCacheConfig,
) -> LatentCacheCard | None:
    """Writes the card, once all shards are there.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        fingerprint: The tokenizer's.
        tokenizer_name: Its preset's name.
        text_encoder: What encoded the captions.
        config: What was cut from each clip.

    Returns:
        The card, or None while shards are missing.

    Raises:
        UserError: No training clip is long enough.
    """
    if unwritten_shards(curated, output):
        return None
    marks = [read_json(_mark_of(output, name)) for name in curated_shards(curated)]
    moments = {split: [mark[split] for mark in marks if split in mark] for split in _SPLITS}
    train = [entry for entry in moments["train"] if entry["samples"]]
    if not train:
        raise UserError(
            f"{output}: no training clip has {config.num_frames} frames. Curate longer clips, or lower num_frames."
        )
    values = sum(entry["values"] for entry in train)
    mean = np.sum([entry["sum"] for entry in train], axis=0) / values
    variance = np.sum([entry["sum_of_squares"] for entry in train], axis=0) / values - mean**2
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
        text_encoder=text_encoder.name,
        text_dim=text_encoder.dim,
        text_length=text_encoder.max_length,
        num_samples={split: sum(entry["samples"] for entry in entries) for split, entries in moments.items()},
    )
    write_json(Path(output) / "cache.json", card.to_dict())
    return card
