"""A curated folder of small clips, as curation would have written it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import webdataset

from nemo_cosmos.contracts import CaptionWindow, ClipRecord, Conditions
from nemo_cosmos.video_io import write_video

SHARDS = {"000000": (0, 1, 2), "000001": (3, 4)}


def write_curated(
    folder: Path,
    *,
    shards: Mapping[str, tuple[int, ...]] = SHARDS,
    short: Mapping[int, int] | None = None,
    size: tuple[int, int] = (32, 32),
) -> Path:
    """Writes `folder / "curated"`: clips of 25 frames of noise; clip 3 is held out.

    Args:
        folder: Where.
        shards: Clip numbers by shard.
        short: Frames of clips that have fewer; these have no actions. By default clip 4 has 5.
        size: Height and width.

    Returns:
        The curated folder.
    """
    root, (height, width) = folder / "curated", size
    short = {4: 5} if short is None else short
    generator = np.random.default_rng(0)
    for shard, clips in shards.items():
        path = root / f"resolution_{height}" / "aspect_ratio_1_1" / "frames_0" / f"shard-{shard}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(path)) as tar:
            for number in clips:
                frames = short.get(number, 25)
                pixels = generator.integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
                video = write_video(folder / f"{number}.mp4", pixels, fps=10)
                record = ClipRecord(
                    clip_id=f"clip{number}",
                    source_video=f"{number}.mp4",
                    source="street" if number % 2 else "arm",
                    rollout=f"r{number}",
                    split="heldout" if number == 3 else "train",
                    start_frame=0,
                    num_frames=frames,
                    fps=10.0,
                    height=height,
                    width=width,
                    captions=(
                        CaptionWindow(start_frame=0, end_frame=10, text=f"first of {number}", captioner="test"),
                        CaptionWindow(start_frame=10, end_frame=frames, text=f"last of {number}", captioner="test"),
                    ),
                    conditions=Conditions(
                        actions=None
                        if number in short
                        else [[float(number), float(t), 0, 0, 0, 0, 0] for t in range(24)]
                    ),
                )
                member = {"__key__": record.clip_id, "mp4": video.read_bytes()}
                tar.write(member | {"json": json.dumps(record.to_dict()).encode()})
    return root
