"""Writing the latent cache, one curated shard at a time, by as many workers as there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from tqdm import tqdm

from nemo_cosmos.contracts import ClipRecord, LatentCacheCard, LatentSample, Split
from nemo_cosmos.data.curated import CuratedClips, caption_at, curated_shards, windows_of
from nemo_cosmos.data.latent_cache import LatentCacheConfig, cache_card
from nemo_cosmos.energon_metadata import (
    forget_energon_metadata,
    tar_index_of,
    write_energon_metadata,
    write_tar_index,
)
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.text import TextEncoder, TextEncoderConfig
from nemo_cosmos.text.cache import hash_of
from nemo_cosmos.tokenizer.statistics import Numbers
from nemo_cosmos.video_io import to_model

_SPLITS: tuple[Split, ...] = ("train", "heldout")
_TEXTS_KEPT = 32
"""Captions whose states a writer holds in memory."""
_LEAST_VARIANCE = 1e-12
"""Below it is rounding error."""

_Text = tuple[torch.Tensor, torch.Tensor]
"""States of a caption's tokens, bf16 [L, D], zero where padded, and the mask, bool [L]."""


class LatentTokenizer(Protocol):
    """What the cache needs of a tokenizer."""

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] -> float latent [B, C, T, H, W] or integer indices [B, T, H, W]."""


def begin_latent_cache(
    curated: str | Path, output: str | Path, fingerprint: str, config: LatentCacheConfig, text_encoder: str
) -> None:
    """Marks an empty folder as the cache of one tokenizer and configuration, or checks that it already is.

    A finished cache whose curated shards have changed since is no longer said to be finished.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        fingerprint: The tokenizer's.
        config: What is cut from each clip.
        text_encoder: Name of the text encoder.

    Raises:
        UserError: There is no curated shard, or the folder belongs to another tokenizer or configuration.
    """
    is_unfinished = bool(unwritten_shards(curated, output))
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
    if is_unfinished:
        cache_card(output).unlink(missing_ok=True)
        forget_energon_metadata(output)


def unwritten_shards(curated: str | Path, output: str | Path) -> list[str]:
    """Lists the curated shards that the cache lacks, or has of an earlier curation; named as by `curated_shards`.

    Raises:
        UserError: There is no curated shard at all.
    """
    return [name for name in curated_shards(curated) if not _is_written(curated, output, name)]


def _is_written(curated: str | Path, output: str | Path, shard: str) -> bool:
    mark = _mark_of(output, shard)
    return mark.exists() and read_json(mark)["curated"] == _state_of(curated, shard)


def _state_of(curated: str | Path, shard: str) -> dict[str, int]:
    """What tells a curated shard from another one of the same name."""
    state = (Path(curated) / shard).stat()
    return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def captions_to_encode(curated: str | Path, shard: str, config: LatentCacheConfig, fingerprint: str) -> list[str]:
    """Captions of all windows that are cut from a curated shard, each once, whose states do not stand there already.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        shard: Its name, as by `curated_shards`.
        config: What is cut.
        fingerprint: The text encoder's.
    """
    clips = CuratedClips(curated, views=config.views, shards=(shard,))
    captions: dict[str, None] = {}  # a dict keeps their order
    for index, record in enumerate(clips.records):
        starts = windows_of(record, num_frames=config.num_frames, stride=config.window_stride)
        wanted = {caption_at(record, start, config.num_frames): None for start in starts}
        stored = clips.text_states(index, fingerprint) if wanted else {}
        captions |= {caption: None for caption in wanted if hash_of(caption) not in stored}
    return list(captions)


class LatentWriter:
    """Encodes the windows of curated shards into shards of the cache.

    What a shard gives depends on that shard alone, and its mark is written last. So shards may be written by any worker
    in any order, and one that was interrupted is simply written again.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache, which `begin_latent_cache` has marked.
        tokenizer: A tokenizer of videos, on this rank's device.
        text_encoder: Encodes the captions.
        config: What to cut.
        text_fingerprint: The text encoder's: where curation stored states of it, those are taken.
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
        text_fingerprint: str | None = None,
        progress: bool = False,
    ) -> None:
        self._curated, self._output = Path(curated), Path(output)
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._config, self._progress, self._text_fingerprint = config, progress, text_fingerprint
        # Windows of one clip stand together and share captions; T5 states take 1 MB each, so only the latest are kept.
        self._text = lru_cache(maxsize=_TEXTS_KEPT)(self._encode_text)

    def write(self, shard: str) -> None:
        """Writes the latents of one curated shard, each split into a tar of its own.

        Args:
            shard: Its name, as by `curated_shards`.

        Raises:
            UserError: The shard is broken, or the disk is full.
        """
        state, moments = _state_of(self._curated, shard), {}
        for split in _SPLITS:
            clips = CuratedClips(self._curated, split=split, views=self._config.views, shards=(shard,))
            tar = _tar_of(self._output, split, shard)
            if any(self._windows(record) for record in clips.records):
                moments[split] = self._write_split(clips, split, tar).to_dict()
                write_tar_index(tar)
            else:
                _remove_tar(tar)
        write_json(_mark_of(self._output, shard), {"curated": state, "splits": moments})

    def _windows(self, record: ClipRecord) -> list[int]:
        return windows_of(record, num_frames=self._config.num_frames, stride=self._config.window_stride)

    def _write_split(self, clips: CuratedClips, split: Split, path: Path) -> _Moments:
        import webdataset

        moments = _Moments()
        with (
            written_aside(path) as aside,
            webdataset.TarWriter(str(aside), mtime=0.0) as tar,
            tqdm(total=len(clips), desc=f"tokenize {split}", unit="clip", disable=not self._progress) as bar,
        ):
            for samples, frames in self._batches(clips, bar):
                video = torch.stack([to_model(f) for f in frames]).to(current_device())
                with torch.inference_mode():
                    latents = self._tokenizer.encode(video).cpu()
                for (sample, record, text), latent in zip(samples, latents, strict=True):
                    moments.add(latent)
                    tar.write(self._member(sample, record, text or self._text(sample.caption), latent))
        return moments

    def _batches(
        self, clips: CuratedClips, bar: tqdm
    ) -> Iterator[tuple[list[tuple[LatentSample, ClipRecord, _Text | None]], list[np.ndarray]]]:
        """Gives samples with their record, and states where these are stored; and the frames of each."""
        config = self._config
        samples, frames = [], []
        for index, record in enumerate(clips.records):
            starts = self._windows(record)
            pixels = clips.frames(index, height=config.height, width=config.width) if starts else None
            stored = clips.text_states(index, self._text_fingerprint) if starts and self._text_fingerprint else {}
            for start in starts:
                sample = _sample(record, start, config)
                samples.append((sample, record, self._padded(stored.get(hash_of(sample.caption)))))
                frames.append(pixels[start : start + config.num_frames])
                if len(samples) == config.batch_size:
                    yield samples, frames
                    samples, frames = [], []
            bar.update()
        if samples:
            yield samples, frames

    def _encode_text(self, caption: str) -> _Text:
        states, mask = self._text_encoder.encode([caption])
        return states[0].bfloat16(), mask[0]

    def _padded(self, stored: torch.Tensor | None) -> _Text | None:
        """Lays stored states, bf16 [tokens, D], out as the encoder would."""
        if stored is None:
            return None
        config = self._text_encoder.config
        states = torch.zeros(config.max_length, config.dim, dtype=torch.bfloat16)
        states[: len(stored)] = stored
        return states, torch.arange(config.max_length) < len(stored)

    def _member(
        self, sample: LatentSample, record: ClipRecord, text: _Text, latent: torch.Tensor
    ) -> dict[str, str | bytes]:
        text_emb, text_mask = text
        stored = latent.to(torch.bfloat16 if latent.is_floating_point() else torch.int32).contiguous()
        tensors = {"latent": stored, "text_emb": text_emb, "text_mask": text_mask}
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


def _remove_tar(tar: Path) -> None:
    tar.unlink(missing_ok=True)
    tar_index_of(tar).unlink(missing_ok=True)


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
    """Per-channel sum and sum of squares, in float64 so that merging is exact enough in any order; none of indices."""

    def __init__(self) -> None:
        self.samples, self.values = 0, 0
        self.total = self.total_squared = np.zeros(0)
        self.shape: tuple[int, ...] = ()

    def add(self, latent: torch.Tensor) -> None:
        """Takes in a latent [C, T, H, W], or indices [T, H, W]."""
        self.shape = tuple(latent.shape)
        if latent.is_floating_point():
            flat = latent.flatten(1).double().numpy()
            self.total = flat.sum(1) + (self.total if self.samples else 0)
            self.total_squared = (flat**2).sum(1) + (self.total_squared if self.samples else 0)
            self.values += flat.shape[1]
        self.samples += 1

    def to_dict(self) -> dict[str, object]:
        return {
            "samples": self.samples,
            "values": self.values,
            "shape": self.shape,
            "sum": self.total.tolist(),
            "sum_of_squares": self.total_squared.tolist(),
        }


def _statistics(entries: list[dict[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over what several `_Moments` saw; empty for indices.

    Raises:
        UserError: A channel does not vary.
    """
    values = sum(entry["values"] for entry in entries)
    if not values:
        return (), ()
    mean = np.sum([entry["sum"] for entry in entries], axis=0) / values
    variance = np.sum([entry["sum_of_squares"] for entry in entries], axis=0) / values - mean**2
    if (constant := np.flatnonzero(~(variance > _LEAST_VARIANCE))).size:
        raise UserError(
            f"latents: channels {constant.tolist()} are the same number everywhere, so they cannot be normalised. "
            "Curate video that differs, or look at the tokenizer's weights."
        )
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def finish_latent_cache(
    curated: str | Path,
    output: str | Path,
    *,
    fingerprint: str,
    tokenizer_name: str,
    text_encoder: TextEncoderConfig,
    config: LatentCacheConfig,
    statistics: tuple[Numbers, Numbers] | None = None,
    vocab_size: int | None = None,
) -> LatentCacheCard | None:
    """Writes the card, once all shards are there.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        fingerprint: The tokenizer's.
        tokenizer_name: Its preset's name.
        text_encoder: What encoded the captions.
        config: What was cut from each clip.
        statistics: Mean and standard deviation that the tokenizer comes with, to normalise its latents by; measured on
            the training split when absent.
        vocab_size: Codes of a discrete tokenizer.

    Returns:
        The card, or None while shards are missing.

    Raises:
        UserError: No training clip is long enough, or a channel of the latents does not vary.
    """
    if unwritten_shards(curated, output):
        return None
    names = curated_shards(curated)
    _remove_others(output, names)
    marks = {name: read_json(_mark_of(output, name))["splits"] for name in names}
    moments = {split: {name: mark[split] for name, mark in marks.items() if split in mark} for split in _SPLITS}
    train = list(moments["train"].values())
    if not train:
        raise UserError(
            f"{output}: no training clip has {config.num_frames} frames. Curate longer clips, or lower num_frames."
        )
    mean, std = statistics or _statistics(train)
    card = LatentCacheCard(
        tokenizer=tokenizer_name,
        tokenizer_fingerprint=fingerprint,
        continuous=bool(mean),
        latent_shape=tuple(train[0]["shape"]),
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        latent_mean=mean,
        latent_std=std,
        text_encoder=text_encoder.name,
        text_dim=text_encoder.dim,
        text_length=text_encoder.max_length,
        vocab_size=vocab_size,
        num_samples={split: sum(e["samples"] for e in entries.values()) for split, entries in moments.items()},
    )
    by_tar = {
        split: {str(_tar_of("", split, name)): entry["samples"] for name, entry in entries.items()}
        for split, entries in moments.items()
    }
    write_energon_metadata(output, by_tar)
    write_json(cache_card(output), card.to_dict())
    return card


def _remove_others(output: str | Path, shards: list[str]) -> None:
    """Removes what was made from shards that an earlier curation had and this one has not."""
    kept = {_tar_of(output, split, name) for name in shards for split in _SPLITS}
    kept |= {_mark_of(output, name) for name in shards}
    for split in _SPLITS:
        for tar in {*(Path(output) / split).glob("[!.]*.tar")} - kept:
            _remove_tar(tar)
    for mark in {*(Path(output) / "shards").glob("[!.]*.json")} - kept:
        mark.unlink(missing_ok=True)
