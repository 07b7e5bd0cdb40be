import json

import numpy as np
import pytest
import webdataset

from nemo_cosmos.contracts import CaptionWindow, ClipRecord, Conditions
from nemo_cosmos.video_io import write_video


@pytest.fixture
def curated(tmp_path):
    """A curated folder of five small clips in two shards; clip 3 is held out, clip 4 too short and without actions."""
    root = tmp_path / "curated"
    generator = np.random.default_rng(0)
    for shard, clips in (("000000", (0, 1, 2)), ("000001", (3, 4))):
        path = root / "resolution_32" / "aspect_ratio_1_1" / "frames_0" / f"shard-{shard}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(path)) as tar:
            for number in clips:
                frames = 5 if number == 4 else 25
                video = write_video(
                    tmp_path / f"{number}.mp4", generator.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8), fps=10
                )
                record = ClipRecord(
                    clip_id=f"clip{number}",
                    source_video=f"{number}.mp4",
                    source="street" if number % 2 else "arm",
                    rollout=f"r{number}",
                    split="heldout" if number == 3 else "train",
                    start_frame=0,
                    num_frames=frames,
                    fps=10.0,
                    height=32,
                    width=32,
                    captions=(
                        CaptionWindow(start_frame=0, end_frame=10, text=f"first of {number}", captioner="test"),
                        CaptionWindow(start_frame=10, end_frame=frames, text=f"last of {number}", captioner="test"),
                    ),
                    conditions=Conditions(
                        actions=None if number == 4 else [[float(number), float(t), 0, 0, 0, 0, 0] for t in range(24)]
                    ),
                )
                member = {"__key__": record.clip_id, "mp4": video.read_bytes()}
                tar.write(member | {"json": json.dumps(record.to_dict()).encode()})
    return root
