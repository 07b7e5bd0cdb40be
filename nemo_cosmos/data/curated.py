"""Reading what curation wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.contracts import ClipRecord, Split
from nemo_cosmos.data.tar_shard import TarShard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import written_aside
from nemo_cosmos.text import unpack_text_states
from nemo_cosmos.video_io import read_video, resize_frames

if TYPE_CHECKING:
    import torch

SINGLE_VIEW = ("front", "side")
"""The one camera of each simulator that single-view models see: the car's front camera and the arm's side camera."""


class CuratedClips:
    """The kept clips of a curated folder, by index, in the order of shards and keys.

    Args:
        root: The folder that `nemo-cosmos curate` wrote.
        split: Only clips of this split.
        sources: Only clips of these domains.
        views: Only these cameras, where a clip has a camera's name; None for all.
        shards: Only what stands in these shards, named as by `curated_shards`; None for all.
            Of chosen shards no clip need pass.

    Raises:
        UserError: The folder holds no shard, or no clip of it passes.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split | None = None,
        sources: tuple[str, ...] | None = None,
        views: tuple[str, ...] | None = None,
        shards: tuple[str, ...] | None = None,
    ) -> None:
        self.root = Path(root)
        self.records: list[ClipRecord] = []
        self._places: list[tuple[TarShard, str]] = []
        for name in curated_shards(root) if shards is None else shards:
            shard = TarShard(self.root / name)
            for key in shard.keys:
                record = ClipRecord.from_dict(json.loads(shard.read(f"{key}.json")))
                if _passes(record, split, sources, views):
                    self.records.append(record)
                    self._places.append((shard, key))
        if not self.records and shards is None:
            wanted = f"split={split}, sources={sources}, views={views}"
            raise UserError(f"{self.root}: no clip passes {wanted}. Curate more video or loosen the choice.")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.records)

    def frames(self, index: int, *, height: int, width: int, cache: bool = False) -> np.ndarray:
        """Decodes a clip at a size.

        Args:
            index: Which clip.
            height: Wanted height in pixels.
            width: Wanted width in pixels.
            cache: Keep the decoded frames in `<root>/.frames_<height>x<width>/` and map them from there next time.

        Returns:
            uint8 [T, height, width, 3]; read-only when mapped.
        """
        shard, key = self._places[index]
        kept = self.root / f".frames_{height}x{width}" / f"{self.records[index].clip_id}.npy"
        if cache and kept.exists():
            return np.load(kept, mmap_mode="r")
        frames, _ = read_video(shard.read(f"{key}.mp4"), name=f"{shard.path}:{key}.mp4")
        frames = resize_frames(frames, height, width)
        if cache:
            with written_aside(kept) as aside:
                np.save(aside, frames)
        return frames

    def span(self, index: int, start: int, num_frames: int) -> np.ndarray:
        """Decodes a part of a clip at its own size.

        Args:
            index: Which clip.
            start: First frame.
            num_frames: Frames from there on.

        Returns:
            uint8 [num_frames, H, W, 3].
        """
        shard, key = self._places[index]
        name = f"{shard.path}:{key}.mp4"
        return read_video(shard.read(f"{key}.mp4"), name=name, first_frame=start, max_frames=num_frames)[0]

    def text_states(self, index: int, fingerprint: str) -> dict[str, torch.Tensor]:
        """Reads the text embeddings that curation stored with a clip.

        Args:
            index: Which clip.
            fingerprint: Of the encoder whose states are wanted, as of `text_encoder_fingerprint`.

        Returns:
            As of `unpack_text_states`; empty when none were stored, or another encoder's.
        """
        shard, key = self._places[index]
        member = f"{key}.safetensors"
        if member not in shard:
            return {}
        return unpack_text_states(shard.read(member), fingerprint, name=f"{shard.path}:{member}")


def curated_shards(root: str | Path) -> list[str]:
    """Lists the shards of a curated folder, as paths relative to it, in order.

    Raises:
        UserError: There is none.
    """
    # Hidden shards were left aside by a killed writer.
    names = sorted(str(path.relative_to(root)) for path in Path(root).glob("resolution_*/**/[!.]*.tar"))
    if not names:
        raise UserError(f"{root}: holds no curated shards. Run nemo-cosmos curate first, or give its output folder.")
    return names


def _passes(
    record: ClipRecord, split: Split | None, sources: tuple[str, ...] | None, views: tuple[str, ...] | None
) -> bool:
    seen_from = record.conditions.view
    return (
        record.rejected_by is None
        and (split is None or record.split == split)
        and (sources is None or record.source in sources)
        and (views is None or seen_from is None or seen_from in views)
    )


def windows_of(record: ClipRecord, *, num_frames: int, stride: int) -> list[int]:
    """First frames of all windows of `num_frames` in a clip, `stride` apart; none when the clip is too short."""
    return list(range(0, record.num_frames - num_frames + 1, stride))


def caption_at(record: ClipRecord, start: int, num_frames: int) -> str:
    """The caption whose frames overlap a window most, or an empty text."""

    def overlap(i: int) -> int:
        window = record.captions[i]
        return min(window.end_frame, start + num_frames) - max(window.start_frame, start)

    best = max(range(len(record.captions)), key=overlap, default=None)
    return record.captions[best].text if best is not None and overlap(best) > 0 else ""
