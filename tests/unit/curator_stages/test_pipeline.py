from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curator_stages import pipeline
from curator_stages.captioning.captioner import Answer, CaptionError, CaptionRequest
from curator_stages.config import CurationConfig
from curator_stages.executor import make_executor
from curator_stages.pipeline import curate
from curator_stages.stages.caption import CaptionStage
from curator_stages.stages.save_span import SaveSpanStage
from curator_stages.tasks import clip_id_of
from curator_stages.work import WorkFolder
from nemo_cosmos.data.curated import CuratedClips
from nemo_cosmos.errors import UserError
from nemo_cosmos.text import text_encoder_fingerprint
from nemo_cosmos.text.cache import hash_of
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture
from tests.unit.text.tiny_t5 import write_tiny_t5


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything that a consumer of the set reads."""
    files = [folder / "manifest.parquet", *folder.glob("resolution_*/**/*.tar")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_whole_road(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    summary = curate(videos, tmp_path / "out", config, progress=False)
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    told = {(r["source_video"], r["start_frame"]): r for r in rows}
    assert set(told) == {
        ("holiday/beach.mp4", 0),
        ("holiday/beach.mp4", 12),
        ("holiday/broken.mp4", 0),
        ("street/drive_a.mp4", 0),
        ("street/drive_b.mp4", 0),
    }
    assert told["holiday/broken.mp4", 0]["rejected_reason"] == "the file is empty (0 bytes)"
    assert told["street/drive_b.mp4", 0]["split"] == "heldout"
    assert "drive_a first half" in told["street/drive_a.mp4", 0]["captions"]
    assert summary.num_kept == sum(r["kept"] for r in rows) == summary.num_clips - sum(summary.rejected.values())
    assert {"read", "shot_split", "transcode", "motion_filter", "caption", "embed", "semantic_dedup", "write"} <= set(
        summary.seconds
    )


def test_captions_are_embedded_and_previews_made_where_asked_for(
    videos: Path, tmp_path: Path, config: CurationConfig
) -> None:
    t5 = str(write_tiny_t5(tmp_path / "t5"))
    config = replace(config, text_encoder=t5, preview_fps=5.0, dedup_similarity=1.0, dedup_similarity_simulated=1.0)
    curate(videos, tmp_path / "out", config, progress=False)
    clips = CuratedClips(tmp_path / "out")
    assert {r.source_video for r in clips.records} > {"street/drive_a.mp4", "street/drive_b.mp4"}
    for index, record in enumerate(clips.records):
        stored = clips.text_states(index, text_encoder_fingerprint(t5))
        assert stored.keys() == {hash_of(window.text) for window in record.captions}
    previews = {path.name for path in (tmp_path / "out" / "previews").iterdir()}
    assert previews == {f"{r.clip_id}.webp" for r in clips.records}


class _Captioner:
    works = False

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        return {r.key: f"seen {r.key}" if self.works else CaptionError("HTTP 500") for r in requests}


def test_a_captioner_that_answered_no_worker_fails_the_run_and_is_asked_again_in_the_next(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("my_captioners")
    module.Captioner = _Captioner
    monkeypatch.setitem(sys.modules, "my_captioners", module)
    monkeypatch.setattr(CaptionStage, "_check", lambda *_: None)  # as when each of many workers is asked little
    config = replace(config, captioner="my_captioners:Captioner", caption_retries=0, max_s=0.5)
    for i in range(3):
        write_video(videos / "more" / f"{i}.mp4", moving_texture(20, seed=20 + i), fps=10)
    with pytest.raises(UserError, match="'my_captioners:Captioner' answered for none of 16 clips.*HTTP 500"):
        curate(videos, tmp_path / "out", config, progress=False)
    spans = tmp_path / "out" / ".work" / "spans"
    # Not the simulated ones, told by their sidecars, and the broken one.
    assert (len(list(spans.iterdir())), len(list(spans.glob("*/failed")))) == (7, 4)
    monkeypatch.setattr(_Captioner, "works", True)
    summary = curate(videos, tmp_path / "out", config, progress=False)
    assert "caption" not in summary.rejected
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert all(f"seen {row['clip_id']}" in row["captions"] for row in rows if row["source"] == "more")


def test_second_run_does_nothing_and_says_so(
    videos: Path, tmp_path: Path, config: CurationConfig, capsys: pytest.CaptureFixture
) -> None:
    first = curate(videos, tmp_path / "out", config, progress=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "lock"}
    second = curate(videos, tmp_path / "out", config)
    assert second == replace(first, unchanged=True)
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_only_what_changed_is_done_again(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    save = SaveSpanStage.process
    monkeypatch.setattr(
        SaveSpanStage, "process", lambda self, task: done.append(task.span.source_video) or save(self, task)
    )
    curate(videos, tmp_path / "out", config, progress=False)
    done.clear()
    write_video(videos / "holiday" / "new.mp4", moving_texture(10, seed=9), fps=10)
    (videos / "holiday" / "broken.mp4").unlink()
    curate(videos, tmp_path / "out", config, progress=False)
    assert done == ["holiday/new.mp4"]
    kept_results = {p.name for p in (tmp_path / "out" / ".work" / "spans").iterdir()}
    assert len(kept_results) == 4
    done.clear()
    curate(videos, tmp_path / "out", replace(config, dedup_similarity=0.5), progress=False)
    assert done == []


def test_missing_shard_is_written_again(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    curate(videos, tmp_path / "out", config, progress=False)
    before = outputs(tmp_path / "out")
    next((tmp_path / "out").glob("resolution_*/**/*.tar")).unlink()
    assert not curate(videos, tmp_path / "out", config, progress=False).unchanged
    assert outputs(tmp_path / "out") == before


_RUN = """
import json, sys
from curator_stages.pipeline import CurationConfig, curate
curate(sys.argv[1], sys.argv[2], CurationConfig(**json.loads(sys.argv[3])), progress=False)
"""


def test_killed_run_goes_on_to_the_same_result(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    for i in range(6):
        write_video(videos / "more" / f"{i}.mp4", moving_texture(20, seed=20 + i), fps=10)
    spans = tmp_path / "killed" / ".work" / "spans"
    command = [sys.executable, "-c", _RUN, str(videos), str(tmp_path / "killed"), json.dumps(asdict(config))]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    _wait_until(lambda: spans.is_dir() and len(list(spans.glob("[!.]*"))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in spans.glob("[!.]*/result.json")}
    assert 3 <= len(finished) < 10
    assert not (tmp_path / "killed" / "manifest.parquet").exists()
    curate(videos, tmp_path / "killed", config, progress=False)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    curate(videos, tmp_path / "whole", config, progress=False)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)


def test_half_written_result_is_cleared_away(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    work = tmp_path / "out" / ".work"
    leftovers = [work / "spans" / ".abc.1234.part", work / ".set.1234.part"]
    for folder in leftovers:
        folder.mkdir(parents=True)
    leftovers.append(tmp_path / "out" / ".report.1234.part.html")
    leftovers[-1].write_text("")
    curate(videos, tmp_path / "out", config, progress=False)
    assert not any(path.exists() for path in leftovers)


def test_lost_worker_is_told(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SaveSpanStage.process
    monkeypatch.setattr(
        SaveSpanStage, "process", lambda self, task: None if "drive_a" in task.span.path else save(self, task)
    )
    with pytest.raises(UserError, match="drive_a.mp4.*Run again"):
        curate(videos, tmp_path / "out", config, progress=False)


def test_what_a_ray_worker_raised_is_unwrapped(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayTaskError

    def fail(*_: object) -> None:
        raise RayTaskError("save_span", "Traceback ...", UserError("the disk is full")).as_instanceof_cause()

    monkeypatch.setattr(SaveSpanStage, "process", fail)
    with pytest.raises(UserError) as caught:
        curate(videos, tmp_path / "out", config, progress=False)
    assert str(caught.value) == "the disk is full"


def test_a_span_that_kills_its_worker_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, seed in (("deadly", 1), ("good", 2)):
        write_video(tmp_path / "in" / f"{name}.mp4", moving_texture(20, seed=seed), fps=10)
    config = replace(config, captioner="tests.unit.curator_stages.worker_stages:DeadlyCaptioner", caption_spans=1)
    monkeypatch.setattr(pipeline, "make_executor", make_executor)  # a worker process, as it is outside tests
    monkeypatch.setenv("DEADLY_CLIP", clip_id_of("deadly.mp4", 0, 20))
    summary = curate(tmp_path / "in", tmp_path / "out", config, progress=False)
    assert (summary.num_kept, summary.rejected) == (1, {"executor": 1})
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    reasons = {row["source_video"]: row["rejected_reason"] for row in rows}
    assert reasons == {"deadly.mp4": "its worker was killed by SIGKILL, twice (out of memory?)", "good.mp4": None}
    # The next run tries it anew; where it fails as before, nothing is new.
    written = (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns
    assert curate(tmp_path / "in", tmp_path / "out", config) == replace(summary, unchanged=True)
    assert "nothing new, 1 of 2 pieces of video failed as before, 1 clips stand already" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns == written
    monkeypatch.delenv("DEADLY_CLIP")
    assert "executor" not in curate(tmp_path / "in", tmp_path / "out", config, progress=False).rejected


def test_folders_of_models_are_named_in_full(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "embed1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    whole = pipeline.with_whole_paths(replace(config, embedding_model="models/embed1"))
    assert whole == replace(config, embedding_model=str(tmp_path / "models" / "embed1"))


def test_two_runs_at_once_are_refused(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    with WorkFolder(tmp_path / "out" / ".work").locked(), pytest.raises(UserError, match="another curation run"):
        curate(videos, tmp_path / "out", config, progress=False)


def test_unwritable_output_is_a_user_error(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"):
        curate(videos, tmp_path / "file" / "out", config, progress=False)


@pytest.mark.parametrize(
    ("change", "executor", "named"),
    [
        ({}, "slurmish", "executor"),
        ({"captioner": "vila"}, "in_process", "captioner"),
        ({"captioner": "simulator"}, "in_process", "beach.mp4"),
        ({"dedup_memory_gb": 0.001}, "in_process", "dedup_memory_gb"),
        ({"dedup_backend": "gpu"}, "in_process", "'gpu' needs RAPIDS"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(
    videos: Path, tmp_path: Path, config: CurationConfig, change: dict, executor: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        curate(videos, tmp_path / "out", replace(config, **change), executor, progress=False)
    assert not (tmp_path / "out").exists()


def test_import_brings_no_torch_and_no_megatron() -> None:
    code = "import sys, curator_stages.pipeline; print([m for m in ('torch', 'megatron', 'nemo') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["ray_data", "xenna"])
def test_ray_gives_what_this_process_gives(videos: Path, tmp_path: Path, config: CurationConfig, executor: str) -> None:
    curate(videos, tmp_path / "ray", config, executor, progress=False)
    curate(videos, tmp_path / "here", config, progress=False)
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_lose_nothing(tmp_path: Path, workers: int) -> None:
    command = [sys.executable, "-m", "tests.unit.curator_stages.kill_many_times", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "--kills", "20", "--workers", str(workers)], check=True, env=environment)
