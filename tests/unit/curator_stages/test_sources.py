"""Videos of folders, globs, manifests and tars, on disk and in fsspec's memory."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_stages import sources
from curator_stages.config import CurationConfig
from curator_stages.decode import probe
from curator_stages.pipeline import curate
from curator_stages.sources import find_videos
from curator_stages.stages import reader
from curator_stages.stages.reader import VideoReaderStage, plan_spans
from curator_stages.stages.shot_split import ShotSplitStage
from curator_stages.stages.transcode import encode_h264
from curator_stages.tasks import VideoSpan
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture, simulated_video


def mp4(seed: int, num_frames: int = 12) -> bytes:
    return encode_h264(moving_texture(num_frames, seed=seed), fps=10.0, crf=16, gop=8)


@pytest.fixture(scope="module")
def movies() -> list[bytes]:
    return [mp4(seed) for seed in range(3)]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def plan(where: str | Path, config: CurationConfig) -> dict[str, VideoSpan]:
    return {span.source_video: span for span in plan_spans(where, None, config)}


def number_of_frames(span: VideoSpan, config: CurationConfig) -> int:
    stage = ShotSplitStage(config=config)
    stage.setup()
    return sum(clip.record.num_frames for clip in stage._split(span))


def test_glob_takes_what_matches_with_its_sidecar(videos: Path, config: CurationConfig) -> None:
    assert list(plan(videos / "*" / "drive_*.mp4", config)) == ["street/drive_a.mp4", "street/drive_b.mp4"]
    spans = plan(videos / "**" / "*_b.mp4", config)
    assert list(spans) == ["street/drive_b.mp4"] and spans["street/drive_b.mp4"].simulated
    assert spans["street/drive_b.mp4"].key == plan(videos, config)["street/drive_b.mp4"].key


@pytest.mark.parametrize("kind", ["csv", "CSV", "jsonl", "parquet"])
def test_manifest_names_and_describes_videos(
    tmp_path: Path, movies: list[bytes], config: CurationConfig, kind: str
) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in zip(("a.mp4", "sub/b.mp4"), movies, strict=False):
        (tmp_path / name).write_bytes(data)
    elsewhere = tmp_path / "sub" / "b.mp4"
    rows = [
        {"path": "a.mp4", "source": "kitchen", "rollout": "0012", "split": "heldout", "caption": "A pot boils."},
        {"path": str(elsewhere), "source": "", "rollout": "0013", "split": "", "caption": ""},
        {"path": "gone.mp4", "source": "", "rollout": "", "split": "", "caption": ""},
    ]
    manifest = tmp_path / f"list.{kind}"
    if kind.lower() == "csv":
        with open(manifest, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), manifest)
    spans = plan(manifest, config)
    assert list(spans) == ["a.mp4", "gone.mp4", "sub/b.mp4"]
    told = spans["a.mp4"].video
    assert (told.source, told.rollout, told.split) == ("kitchen", "0012", "heldout")
    (caption,) = told.captions
    assert (caption.text, caption.start_frame, caption.end_frame) == ("A pot boils.", 0, 12)
    assert spans["sub/b.mp4"].video.source == "sub" and not spans["sub/b.mp4"].video.captions
    assert spans["gone.mp4"].error == "cannot be read (No such file or directory)"
    assert number_of_frames(spans["a.mp4"], config) == 12


def test_a_manifest_that_tells_lengths_spares_opening_the_videos(
    tmp_path: Path, movies: list[bytes], config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(movies[0])
    rows = "path,fps,num_frames\na.mp4,10.0,12\nb.mp4,,12\nc.mp4,1000,12\nd.mp4,ten,12\n"
    (tmp_path / "list.csv").write_text(rows)
    opened: list[str] = []
    monkeypatch.setattr(reader, "probe", lambda path, **how: opened.append(Path(path).name) or probe(path, **how))
    spans = plan(tmp_path / "list.csv", config)
    assert opened == ["b.mp4"]
    assert [(spans[f"{name}.mp4"].video.fps, spans[f"{name}.mp4"].video.num_frames) for name in "ab"] == [(10, 12)] * 2
    assert number_of_frames(spans["a.mp4"], config) == 12
    assert spans["c.mp4"].error == "its row tells of fps 1000 and num_frames 12 (out of range)"
    assert "its row tells of fps ten and num_frames 12 (could not convert" in spans["d.mp4"].error


def test_manifest_without_paths_is_a_user_error(tmp_path: Path, config: CurationConfig) -> None:
    (tmp_path / "list.csv").write_text("video\na.mp4\n")
    with pytest.raises(UserError, match="column `path`"):
        plan(tmp_path / "list.csv", config)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read as a manifest"),
        ('{"path": "a.mp4"}\n{"source": "b"}', r"list.jsonl, row 2: got .*'b'.*a value for `path`"),
        ('{"path": "a.mp4"}\n{"path": null}', "row 2"),
        ('{"path": "a.mp4"}\n["b.mp4"]', "row 2: .*a value for `path`"),
        ('{"path": "a.mp4"}\n{"path": "b.mp4"}\n{"path": "./a.mp4"}', "a.mp4 twice .*every video once"),
    ],
)
def test_a_wrong_row_of_a_manifest_is_named(tmp_path: Path, config: CurationConfig, text: str, told: str) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        plan(tmp_path / "list.jsonl", config)


def test_tars_give_videos_with_their_captions_and_sidecars(
    tmp_path: Path, movies: list[bytes], config: CurationConfig
) -> None:
    sidecar = json.dumps(simulated_video(12).to_dict()).encode()
    first = {"x.mp4": movies[0], "x.txt": b"A wall slides.\n", "y.mp4": movies[1], "y.json": b'{"source": "walls"}'}
    (tmp_path / "set-000.tar").write_bytes(tar_of(first))
    (tmp_path / "set-001.tar").write_bytes(tar_of({"x.mp4": movies[2], "x.json": sidecar, "notes.md": b"no video"}))
    (tmp_path / "set-002.tar").write_bytes(b"no tar" * 200)
    for pattern in ("set-*.tar", "set-{000..002}.tar"):
        spans = plan(tmp_path / pattern, config)
        assert list(spans) == ["set-000/x.mp4", "set-000/y.mp4", "set-001/x.mp4", "set-002.tar"]
    assert spans["set-000/x.mp4"].video.captions[0].text == "A wall slides."
    assert spans["set-000/y.mp4"].video.source == "walls"
    assert spans["set-001/x.mp4"].simulated and spans["set-001/x.mp4"].error is None
    assert "cannot be read as a tar" in spans["set-002.tar"].error
    assert [number_of_frames(span, config) for span in list(spans.values())[:3]] == [12, 12, 12]
    assert list(plan(tmp_path / "set-001.tar", config)) == ["set-001/x.mp4"]


def test_texts_in_tars_are_read_beside_videos_only_and_up_to_a_size(
    tmp_path: Path, movies: list[bytes], config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_TEXT_BYTES", 100)
    members = {"x.mp4": movies[0], "x.txt": b"A wall.", "y.mp4": movies[1], "y.json": b" " * 101, "z.txt": b"\xff" * 50}
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    spans = plan(tmp_path / "t.tar", config)
    assert list(spans) == ["t/x.mp4", "t/y.mp4"]
    assert spans["t/x.mp4"].video.captions[0].text == "A wall."
    assert spans["t/y.mp4"].error == "its y.json has 101 bytes, over 100"


def test_addresses_are_read_like_folders(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, movies: list[bytes], config: CurationConfig
) -> None:
    memory.pipe("/bucket/street/a.mp4", movies[0])
    memory.pipe("/bucket/street/a.json", json.dumps(simulated_video(12).to_dict()).encode())
    memory.pipe("/bucket/street/empty.mp4", b"")
    memory.pipe("/bucket/tars/t.tar", tar_of({"b.mp4": movies[1]}))
    memory.pipe("/bucket/list.jsonl", b'{"path": "street/a.mp4"}\n{"path": "memory://bucket/street/empty.mp4"}\n')
    spans = plan("memory://bucket", config)
    assert list(spans) == ["street/a.mp4", "street/empty.mp4"]
    assert spans["street/a.mp4"].simulated and spans["street/empty.mp4"].error == "the file is empty (0 bytes)"
    assert number_of_frames(spans["street/a.mp4"], config) == 12
    assert list(plan("memory://bucket/street/a*.mp4", config)) == ["a.mp4"]
    assert number_of_frames(plan("memory://bucket/tars/*.tar", config)["t/b.mp4"], config) == 12
    assert list(plan("memory://bucket/list.jsonl", config)) == ["street/a.mp4", "street/empty.mp4"]
    summary = curate("memory://bucket", tmp_path / "out", config, progress=False)
    assert (summary.num_kept, summary.rejected) == (1, {"read": 1})
    assert curate("memory://bucket", tmp_path / "out", config, progress=False).unchanged


def test_file_addresses_are_paths(videos: Path, config: CurationConfig) -> None:
    there, here = plan(f"file://{videos}", config), plan(videos, config)
    assert {name: span.key for name, span in there.items()} == {name: span.key for name, span in here.items()}


def test_a_changed_file_behind_an_address_has_another_key(
    memory: fsspec.AbstractFileSystem, movies: list[bytes], config: CurationConfig
) -> None:
    def key() -> str:
        return plan("memory://bucket", config)["a.mp4"].key

    memory.pipe("/bucket/a.mp4", movies[0])
    first = key()
    assert key() == first
    memory.pipe("/bucket/a.mp4", movies[1])
    assert key() != first


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("nonsense://bucket", "cannot be reached"),
        ("/nowhere/*.mp4", "at least one of"),
        ("/nowhere.tar", "cannot be read"),
    ],
)
def test_what_is_not_there_is_a_user_error(where: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        find_videos(where)


def test_reader_is_a_stage_of_its_own(videos: Path, config: CurationConfig) -> None:
    from nemo_curator.pipeline import Pipeline

    from curator_stages.executor import InProcessExecutor

    stages = [VideoReaderStage(input_dir=str(videos / "street"), config=config), ShotSplitStage(config=config)]
    tasks = Pipeline(name="mine", stages=stages).run(InProcessExecutor())
    assert sorted(task.data[0].record.source_video for task in tasks) == ["drive_a.mp4", "drive_b.mp4"]
    assert all(np.ndim(task.data[0].pixels) == 4 for task in tasks)


def test_sidecar_is_read_once_and_names_itself(tmp_path: Path, config: CurationConfig) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(4, seed=0), fps=10)
    write_json(tmp_path / "v.json", {"source": "street"})
    assert "its sidecar v.json is not a RawVideo" in plan(tmp_path, config)["v.mp4"].error


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path, movies: list[bytes]) -> None:
    for name in ("in/own/a.mp4", "elsewhere/deep/b.mp4", "in/out/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(movies[0])
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "own")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "output").symlink_to(tmp_path / "in" / "out")
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    found = find_videos(tmp_path / "in", leave_out=tmp_path / "in" / "out")
    assert [video.name for video in found] == ["linked/deep/b.mp4", "own/a.mp4"]
    assert all(video.error is None for video in found)
