"""Which size a source is stored at, and where its clips go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curator_stages.buckets import bucket_of, stored_size
from curator_stages.config import CurationConfig
from curator_stages.pipeline import curate
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.data.curated import CuratedClips, curated_shards
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture

SIZES = ((256, 256), (256, 448), (448, 256), (480, 768), (704, 1280), (960, 960))


@pytest.mark.parametrize(
    ("size", "frames", "folder"),
    [
        ((256, 256), 17, "resolution_256/aspect_ratio_1_1/frames_17_32"),
        ((704, 1280), 65, "resolution_704/aspect_ratio_16_9/frames_65_128"),
        ((480, 640), 64, "resolution_480/aspect_ratio_4_3/frames_33_64"),
        ((1280, 720), 2, "resolution_720/aspect_ratio_9_16/frames_2_2"),
    ],
)
def test_buckets(size: tuple[int, int], frames: int, folder: str) -> None:
    record = ClipRecord(
        clip_id="a", source_video="a", source="s", rollout="a", split="train", start_frame=0, num_frames=frames,
        fps=10.0, height=size[0], width=size[1],
    )  # fmt: skip
    assert bucket_of(record).folder == folder


@pytest.mark.parametrize(
    ("source", "stored"),
    [
        ((1080, 1920), (704, 1280)),
        ((720, 1280), (704, 1280)),
        ((703, 1279), (480, 768)),
        ((360, 640), (256, 448)),
        ((90, 160), (256, 448)),
        ((800, 1920), (704, 1280)),
        ((1920, 1080), (448, 256)),
        ((1000, 1000), (960, 960)),
        ((900, 1000), (256, 256)),
        ((1200, 1600), (960, 960)),
    ],
    ids=["larger", "just", "not-quite", "small", "smaller-than-all", "wide", "upright", "square", "nearly", "4-3"],
)
def test_a_source_goes_to_the_largest_size_of_its_shape(source: tuple[int, int], stored: tuple[int, int]) -> None:
    assert stored_size(*source, SIZES) == stored


def test_sizes_by_shape_go_to_shards_of_their_own_and_are_read_as_ever(tmp_path: Path, config: CurationConfig) -> None:
    shapes = {"wide": (72, 128), "square": (96, 96), "upright": (128, 72)}
    for seed, (name, (height, width)) in enumerate(shapes.items()):
        frames = moving_texture(12, seed=seed, height=height, width=width)
        write_video(tmp_path / "in" / f"{name}.mp4", frames, fps=10)
    sizes = [[64, 64], [64, 112], [112, 64]]
    # Textures look alike to the embedding, and all are to be kept.
    config = replace(config, sizes=sizes, dedup_similarity=1.0)
    curate(tmp_path / "in", tmp_path / "out", config, progress=False)
    rows = {r["source_video"]: r for r in pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()}
    stored = {name: (rows[f"{name}.mp4"]["height"], rows[f"{name}.mp4"]["width"]) for name in shapes}
    assert stored == {"wide": (64, 112), "square": (64, 64), "upright": (112, 64)}
    folders = {shard.rsplit("/", 1)[0] for shard in curated_shards(tmp_path / "out")}
    assert folders == {f"resolution_64/aspect_ratio_{ratio}/frames_9_16" for ratio in ("16_9", "1_1", "9_16")}
    clips = CuratedClips(tmp_path / "out")
    assert {clips.frames(i, height=32, width=32).shape for i in range(len(clips))} == {(12, 32, 32, 3)}
