"""The stages that work on all clips of a run."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from curator_stages.config import CurationConfig
from curator_stages.dedup.clips import Duplicate, mark_duplicates, ranks_of
from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.embedding_files import EmbeddingFiles
from curator_stages.dedup.semantic import semantic_dedup
from curator_stages.stages import write
from curator_stages.stages.exact_dedup import ExactDedupStage
from curator_stages.stages.preview import PreviewStage
from curator_stages.stages.report import ReportStage
from curator_stages.stages.semantic_dedup import SemanticDedupStage, check_memory, find_duplicates
from curator_stages.stages.statistics import StatisticsStage, statistics_by_source, statistics_of
from curator_stages.stages.transcode import encode_h264
from curator_stages.stages.write import WriteStage
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import CaptionWindow, ClipRecord, Conditions
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import read_video
from tests.unit.curator_stages.dedup.embeddings import stand_in_workflow
from tests.unit.curator_stages.samples import moving_texture
from tests.unit.energon_prepared import assert_prepared_as_by_energon


def record(name: str, *, pixels: int = 100, frames: int = 10, rollout: str | None = None, start: int = 0) -> ClipRecord:
    """A clip of `pixels` x `pixels`; a simulated one where `rollout` is given."""
    return ClipRecord(
        clip_id=name,
        source_video=f"{name}.mp4",
        source="s",
        rollout=rollout or name,
        split="train",
        start_frame=start,
        num_frames=frames,
        fps=10.0,
        height=64,
        width=64,
        conditions=Conditions(actions=[[0.0] * 7] * (frames - 1)) if rollout else Conditions(),
        scores={"source_height": float(pixels), "source_width": float(pixels)},
    )


def near(similarities: list[float]) -> np.ndarray:
    """Unit vectors [N, 8] with these cosines to the first one, which is the first row."""
    rows = [np.eye(8)[0]] + [
        c * np.eye(8)[0] + np.sqrt(1 - c * c) * np.eye(8)[i + 1] for i, c in enumerate(similarities)
    ]
    return np.stack(rows).astype(np.float32)


def duplicates(records: list[ClipRecord], embeddings: np.ndarray, config: CurationConfig) -> dict[int, int]:
    """The better clip that each duplicate is nearest to."""
    found = find_duplicates(records, lambda: [embeddings], embeddings.shape[1], config)
    return {row: duplicate.of for row, duplicate in found.items()}


def test_highest_resolution_is_kept_then_the_longest(config: CurationConfig) -> None:
    records = [record("small", pixels=50, frames=30), record("short"), record("best", frames=20), record("other")]
    same = np.repeat(near([]), 3, axis=0)
    assert duplicates(records, np.concatenate([same, near([0.5])[1:]]), config) == {0: 2, 1: 2}


def test_length_is_in_seconds_and_among_equals_the_first_id_is_kept() -> None:
    slow, fast = replace(record("slow"), fps=5.0), replace(record("fast", frames=15), fps=30.0)
    ordered = [slow, record("ab"), record("ba"), fast]
    for records in (ordered, ordered[::-1]):
        assert [records[i].clip_id for i in np.argsort(ranks_of(records))] == ["slow", "ab", "ba", "fast"]


@pytest.mark.parametrize(
    ("first", "second", "similarity", "duplicate"),
    [
        (record("a"), record("b"), 0.96, True),
        (record("a"), record("b"), 0.94, False),
        (record("a", rollout="x"), record("b", rollout="x", start=10), 1.0, False),
        (record("a", rollout="x"), record("b", rollout="x"), 1.0, True),
        (record("a", rollout="x"), record("b", rollout="y"), 0.96, False),
        (record("a", rollout="x"), record("b", rollout="y"), 0.995, True),
        (record("a", rollout="x"), record("b"), 0.96, True),
    ],
    ids=["real", "real-apart", "same-rollout", "copied", "rollouts-alike", "rollouts-same", "mixed"],
)
def test_what_is_held_against_what(
    config: CurationConfig, first: ClipRecord, second: ClipRecord, similarity: float, duplicate: bool
) -> None:
    assert bool(duplicates([first, second], near([similarity]), config)) is duplicate


def test_clusters_give_what_one_cluster_gives(config: CurationConfig) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    noisy = centres.repeat(5, 0) + rng.normal(0, 0.01, (200, 16))
    embeddings = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    records = [record(f"{i:03d}") for i in range(200)]
    whole = duplicates(records, embeddings, config)
    assert duplicates(records, embeddings, replace(config, dedup_clusters=8)) == whole
    assert set(whole) == set(range(200)) - set(range(0, 200, 5))


def test_memory_for_comparing_is_a_setting(config: CurationConfig) -> None:
    for clips, least in ((3_400_000, 1.5), (40_000_000, 8.0)):
        check_memory(clips, 1280, replace(config, dedup_memory_gb=least))
    with pytest.raises(UserError, match=r"dedup_memory_gb: got 1.5, expected at least 1\.\d+ for 4,000,000 clips"):
        check_memory(4_000_000, 1280, config)
    few = [record(f"{i:05d}") for i in range(30_000)]
    with pytest.raises(UserError, match="dedup_memory_gb: got 0.1, .*fewer dedup_clusters"):
        find_duplicates(few, lambda: [], 1280, replace(config, dedup_memory_gb=0.1))


def test_embeddings_are_written_as_dedup_reads_them(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curator_stages.stages.semantic_dedup._FILES_AT_ONCE", 1)
    monkeypatch.setattr("curator_stages.dedup.embedding_files._BATCHES_PER_FILE", 3)
    rows = {c.record.clip_id: c for c in run_set(clips, tmp_path / "out", config).data}
    files = EmbeddingFiles.open(tmp_path / "out" / "embeddings")
    assert len(files.paths) == 2 and files.ids.tolist() == [b"a", b"b", b"c", b"d"]
    assert files.ranks.tolist() == ranks_of([rows[name].record for name in "abcd"]).tolist()
    np.testing.assert_array_equal(np.concatenate(list(files.batches())), near([0.99, 0.2, 0.1]))
    result = semantic_dedup(
        tmp_path / "out" / "embeddings", tmp_path / "dedup", SemanticDedupConfig(eps_to_extract=0.05)
    )
    assert pq.read_table(result.duplicates).to_pydict()["id"] == ["a"]


def test_gpu_back_end_marks_what_nemo_curators_workflow_finds(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SemanticDedupStage(config=replace(config, dedup_backend="gpu"), scratch_dir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "nemo_curator.stages.deduplication.semantic", None)
    with pytest.raises(UserError, match="'gpu' needs RAPIDS"):
        stage.process(ClipSetTask(dataset_name="clips", data=clips))
    there = set(tmp_path.iterdir())
    given = stand_in_workflow(monkeypatch, [("b", "b", 0.0), ("a", "b", 0.96), ("c", "a", 0.94), ("d", "a", 0.2)])
    done = stage.process(ClipSetTask(dataset_name="clips", data=list(clips))).data
    assert Path(given["input_path"][0]).is_relative_to(tmp_path) and set(tmp_path.iterdir()) == there
    rejected = {c.record.clip_id: c.record for c in done if c.record.rejected_by == "semantic_dedup"}
    assert list(rejected) == ["a"] and rejected["a"].tags == ("duplicate_of:b",)
    assert rejected["a"].rejected_reason == "near-duplicate of b (cosine similarity 0.9600)"
    simulated = StoredClip(record=record("a", rollout="x"), folder=clips[0].folder)
    with pytest.raises(UserError, match="dedup_backend: got 'gpu', expected cpu for clips with actions"):
        stage.process(ClipSetTask(dataset_name="clips", data=[simulated, *clips[1:]]))


def test_same_pictures_are_found_by_their_bytes(clips: list[StoredClip]) -> None:
    better, twin, acting = (record(name, frames=10, pixels=p) for name, p in (("x", 300), ("y", 100), ("z", 100)))
    acting = replace(acting, conditions=Conditions(actions=[[1.0] * 7] * 9))
    copies = [StoredClip(record=item, folder=clips[0].folder) for item in (twin, better, acting)]
    for copy in copies:
        copy.file(".mp4").write_bytes(clips[0].file(".mp4").read_bytes())
    done = ExactDedupStage().process(ClipSetTask(dataset_name="clips", data=[*clips, *copies])).data
    rejected = {c.record.clip_id: c.record.rejected_reason for c in done if c.record.rejected_by == "exact_dedup"}
    assert rejected == {"a": "the same pictures as x", "y": "the same pictures as x"}


def test_a_chain_of_duplicates_names_the_kept_one(clips: list[StoredClip]) -> None:
    found = {0: Duplicate(1, "like {}", {}), 1: Duplicate(2, "like {}", {"dedup_similarity": 0.5})}
    first, second = (c.record for c in mark_duplicates(clips, range(4), found, "semantic_dedup")[:2])
    assert (first.tags, first.rejected_reason) == (("duplicate_of:c",), "like b")
    assert second.scores["dedup_similarity"] == 0.5


def test_every_link_of_a_long_chain_of_duplicates_is_followed_once(clips: list[StoredClip]) -> None:
    class Counted(dict):
        looked_up = 0

        def __getitem__(self, row: int) -> Duplicate:
            self.looked_up += 1
            return super().__getitem__(row)

    count = 500
    found = Counted({row: Duplicate(row - 1, "like {}", {}) for row in range(count - 1, 0, -1)})
    assert len(mark_duplicates([clips[0]] * count, range(count), found, "semantic_dedup")) == count
    assert found.looked_up < 2 * count


@pytest.fixture
def clips(tmp_path: Path) -> list[StoredClip]:
    """Four clips with files, one of them a duplicate, and one rejected without files."""
    records = [record("a"), record("b", frames=12, pixels=200), record("c", frames=20), record("d")]
    stored = []
    for number, (item, vector) in enumerate(zip(records, near([0.99, 0.2, 0.1]), strict=True)):
        clip = StoredClip(record=item, folder=str(tmp_path))
        frames = moving_texture(item.num_frames, seed=number, height=64, width=64)
        clip.file(".mp4").write_bytes(encode_h264(frames, fps=10.0, crf=16, gop=8))
        cv2.imwrite(str(clip.file(".jpg")), frames[0])
        np.save(clip.file(".npy"), vector)
        clip.file(".webp").write_bytes(PreviewStage(target_fps=2.0)._animation(frames, 10.0))
        clip.file(".safetensors").write_bytes(item.clip_id.encode())
        stored.append(clip)
    broken = replace(
        record("e"), num_frames=0, fps=0.0, rejected_by="read", rejected_reason="the file is empty (0 bytes)"
    )
    return [*stored, StoredClip(record=broken, folder=str(tmp_path))]


def run_set(clips: list[StoredClip], output: Path, config: CurationConfig) -> ClipSetTask:
    task = ClipSetTask(dataset_name="clips", data=list(clips))
    stages = [
        SemanticDedupStage(config=config),
        WriteStage(output_dir=str(output), config=config),
        StatisticsStage(output_dir=str(output)),
        ReportStage(output_dir=str(output), seconds={"read": 1.0}),
    ]
    for stage in stages:
        task = stage.process(task)
    return task


def test_shards_are_read_by_webdataset(clips: list[StoredClip], tmp_path: Path, config: CurationConfig) -> None:
    output = tmp_path / "out"
    run_set(clips, output, replace(config, clips_per_shard=1))
    tars = sorted(output.glob("resolution_*/aspect_ratio_*/frames_*/*.tar"))
    assert [t.relative_to(output).as_posix() for t in tars] == [
        "resolution_64/aspect_ratio_1_1/frames_17_32/train-000000.tar",
        "resolution_64/aspect_ratio_1_1/frames_9_16/train-000000.tar",
        "resolution_64/aspect_ratio_1_1/frames_9_16/train-000001.tar",
    ]
    for sample in webdataset.WebDataset([str(t) for t in tars], shardshuffle=False):
        told = ClipRecord.from_dict(json.loads(sample["json"]))
        assert told.clip_id == sample["__key__"]
        assert sample["__url__"].endswith(told.shard)
        assert len(read_video(sample["mp4"])[0]) == told.num_frames
        assert sample["safetensors"].decode() == told.clip_id


class Passes(list):
    """A list that counts how often it is gone through."""

    count = 0

    def __iter__(self) -> Iterator:
        self.count += 1
        return super().__iter__()


def test_clips_are_gone_through_equally_often_for_any_number_of_shards_and_sources(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, with_shards = [], write._with_shards
    monkeypatch.setattr(write, "_with_shards", lambda *given: passes.append(Passes(with_shards(*given))) or passes[-1])
    for most in (1, 100):
        stage = WriteStage(output_dir=str(tmp_path / "out"), config=replace(config, clips_per_shard=most))
        stage.process(ClipSetTask(dataset_name="clips", data=clips))
    assert passes[0].count == passes[1].count
    one, many = (Passes(replace(c.record, source=f"{i % n}") for i, c in enumerate(clips)) for n in (1, 4))
    assert len(statistics_by_source(one)) == 1 and len(statistics_by_source(many)) == 4
    assert one.count == many.count


def test_previews_of_kept_clips_stand_together(clips: list[StoredClip], tmp_path: Path, config: CurationConfig) -> None:
    stage = WriteStage(output_dir=str(tmp_path / "out"), config=config)
    clips[0] = replace(clips[0], record=replace(clips[0].record, rejected_by="semantic_dedup"))
    for given, expected in ((clips, {"b.webp", "c.webp", "d.webp"}), (clips[2:], {"c.webp", "d.webp"})):
        stage.process(ClipSetTask(dataset_name="clips", data=given))
        previews = {path.name: path.read_bytes() for path in (tmp_path / "out" / "previews").iterdir()}
        assert previews == {name: (tmp_path / name).read_bytes() for name in expected}
    for clip in clips[:-1]:
        clip.file(".webp").unlink()
    stage.process(ClipSetTask(dataset_name="clips", data=clips))
    assert not (tmp_path / "out" / "previews").exists()


def test_statistics_by_source_and_of_all(clips: list[StoredClip], tmp_path: Path) -> None:
    said = (CaptionWindow(start_frame=0, end_frame=5, text="a red car", captioner="c"),)
    changes = {
        0: {"rejected_by": "semantic_dedup"},
        1: {"captions": said, "split": "heldout"},
        2: {"source": "t", "height": 128},
    }
    clips = [replace(c, record=replace(c.record, **changes.get(i, {}))) for i, c in enumerate(clips)]
    StatisticsStage(output_dir=str(tmp_path / "out")).process(ClipSetTask(dataset_name="clips", data=clips))
    told = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert told["total"] == {
        "videos": 5,
        "clips": 5,
        "hours": round(5.2 / 3600, 6),
        "kept_clips": 3,
        "kept_hours": round(4.2 / 3600, 6),
        "kept_ratio": 0.6,
        "heldout_clips": 1,
        "clips_with_actions": 0,
        "resolutions": {"64": 3},
        "aspect_ratios": {"1_1": 2, "9_16": 1},
        "lengths": {"9_16": 2, "17_32": 1},
        "captioned_clips": 1,
        "caption_windows": 1,
        "caption_characters": 9.0,
        "caption_words": 3.0,
    }
    by_source = told["by_source"]
    assert {name: (s["clips"], s["kept_clips"]) for name, s in by_source.items()} == {"s": (4, 2), "t": (1, 1)}
    assert by_source["t"]["caption_words"] is None and by_source["t"]["aspect_ratios"] == {"9_16": 1}
    assert statistics_of([]).kept_ratio == 0


def test_shards_are_of_one_split_and_prepared_as_by_energon(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig
) -> None:
    clips[1] = replace(clips[1], record=replace(clips[1].record, split="heldout"))
    run_set(clips, tmp_path / "out", config)
    run_set(clips, tmp_path / "out", config)  # a set that stood there before goes in full
    tars = sorted((tmp_path / "out").glob("resolution_*/aspect_ratio_*/frames_*/*.tar"))
    assert [f"{tar.parent.name}/{tar.name}" for tar in tars] == [
        "frames_17_32/train-000000.tar",
        "frames_9_16/heldout-000000.tar",
        "frames_9_16/train-000000.tar",
    ]
    assert_prepared_as_by_energon(tmp_path / "out", tmp_path / "scratch")


def test_manifest_has_a_row_for_every_clip(clips: list[StoredClip], tmp_path: Path, config: CurationConfig) -> None:
    run_set(clips, tmp_path / "out", config)
    rows = {row["clip_id"]: row for row in pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()}
    assert {name: row["kept"] for name, row in rows.items()} == dict(a=False, b=True, c=True, d=True, e=False)
    assert rows["a"]["rejected_reason"] == "near-duplicate of b (cosine similarity 0.9900)"
    assert rows["a"]["score_dedup_similarity"] == pytest.approx(0.99) and rows["b"]["score_dedup_similarity"] is None
    assert rows["e"]["rejected_by"] == "read" and rows["e"]["shard"] is None


def test_report_tells_everything(clips: list[StoredClip], tmp_path: Path, config: CurationConfig) -> None:
    run_set(clips, tmp_path / "out", config)
    page = (tmp_path / "out" / "report.html").read_text()
    for part in (
        "Funnel",
        "Near-duplicates",
        "similarity 0.990",
        '<td class="">e.mp4</td><td class="">the file is empty (0 bytes)</td>',
        "data:image/webp",
        "data:video/mp4",
        "60%",
        "17 to 32",
    ):
        assert part in page
    assert page.index("kept · b.mp4") < page.index("semantic_dedup · a.mp4")
    assert not re.search(r"(src|href)=[\"'](?!data:)", page), "fetches something from outside"
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert summary["num_kept"] == 3 and summary["rejected"] == {"read": 1, "semantic_dedup": 1}


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_report_is_drawn_by_a_browser(clips: list[StoredClip], tmp_path: Path, config: CurationConfig) -> None:
    run_set(clips, tmp_path / "out", config)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,4000"]
    picture = tmp_path / "page.png"
    page = f"file://{tmp_path / 'out' / 'report.html'}"
    subprocess.run([*command, f"--screenshot={picture}", page], check=True, capture_output=True, timeout=60)
    seen = cv2.imread(str(picture))
    assert seen.shape[1] == 1000
    inked = (np.abs(seen.astype(int) - seen[0, 0]).max(-1) > 30).any(1)
    assert inked[:2500].mean() > 0.4, "most of the page is blank"
    drawn = subprocess.run([*command, "--dump-dom", page], check=True, capture_output=True, text=True, timeout=60)
    assert drawn.stdout.count("<figure>") == (tmp_path / "out" / "report.html").read_text().count("<figure>")


def test_a_set_with_nothing_kept_is_still_reported(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig
) -> None:
    run_set(clips[-1:], tmp_path / "out", config)
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").num_rows == 1
    assert (tmp_path / "out" / "report.html").is_file()


def test_full_disk_leaves_the_former_set(
    clips: list[StoredClip], tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run_set(clips, output, config)
    before = {p: p.read_bytes() for p in output.rglob("*.tar")} | {output / "manifest.parquet": None}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("curator_stages.stages.write.write_manifest", full)
    with pytest.raises(UserError, match="disk is full"):
        run_set(clips[1:], output, config)
    assert all(p.is_file() and (data is None or p.read_bytes() == data) for p, data in before.items())
