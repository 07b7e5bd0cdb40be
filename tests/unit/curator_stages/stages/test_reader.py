from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from curator_stages.config import CurationConfig
from curator_stages.decode import VideoInfo
from curator_stages.pipeline import curate
from curator_stages.stages import reader
from curator_stages.stages.reader import _borders, check_captions, plan_spans
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import moving_texture, simulated_video, write_simulated


def test_videos_are_found_with_their_sidecars(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    (videos / ".hidden.part.mp4").write_bytes(b"x")
    spans = {s.source_video: s for s in plan_spans(videos, tmp_path / "out", config)}
    assert list(spans) == ["holiday/beach.mp4", "holiday/broken.mp4", "street/drive_a.mp4", "street/drive_b.mp4"]
    assert spans["street/drive_b.mp4"].video.split == "heldout"
    assert spans["street/drive_a.mp4"].simulated and not spans["holiday/beach.mp4"].simulated
    assert spans["holiday/beach.mp4"].video.source == "holiday"
    assert spans["holiday/broken.mp4"].error == "the file is empty (0 bytes)"


def test_source_of_a_video_at_the_top_is_user(tmp_path: Path, config: CurationConfig) -> None:
    write_video(tmp_path / "in" / "mine.MP4.mp4", moving_texture(4, seed=0), fps=10)
    assert [s.video.source for s in plan_spans(tmp_path / "in", tmp_path / "out", config)] == ["user"]


def test_output_inside_input_is_not_read(videos: Path, config: CurationConfig) -> None:
    write_video(videos / "out" / "own.mp4", moving_texture(4, seed=0), fps=10)
    assert all("own" not in s.source_video for s in plan_spans(videos, videos / "out", config))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (False, "an existing folder with videos. Check the path."),
        (True, "at least one of *.avi, *.m4v, *.mkv, *.mov, *.mp4, *.webm. Put videos there."),
    ],
    ids=["missing", "empty"],
)
def test_no_videos_is_an_error(tmp_path: Path, config: CurationConfig, make: bool, expected: str) -> None:
    folder = tmp_path / "in"
    if make:
        folder.mkdir()
    with pytest.raises(UserError) as raised:
        plan_spans(folder, tmp_path / "out", config)
    assert str(raised.value) == f"input folder: got '{folder}', expected {expected}"


def test_heldout_share_follows_the_file_name_only(tmp_path: Path, config: CurationConfig) -> None:
    for i in range(200):
        (tmp_path / "in" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(i % 2) / f"{i // 2}.mp4").write_bytes(b"")
    spans = plan_spans(tmp_path / "in", tmp_path / "out", config)
    by_name = {}
    for span in spans:
        by_name.setdefault(Path(span.source_video).name, set()).add(span.video.split)
    assert all(len(splits) == 1 for splits in by_name.values())
    assert 3 <= sum(splits == {"heldout"} for splits in by_name.values()) <= 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fps": 25.0}, "says 25 frames per second, the file 10"),
        ({"num_frames": 19}, "actions: got 19 entries, expected 18"),
        (None, "not a RawVideo"),
        ({"fps": "10"}, "fps: got '10', expected a number above 0"),
        ({"fps": float("nan")}, "fps: got nan"),
        ({"fps": 10**400}, "fps: got 1000"),
        ({"num_frames": "20"}, "num_frames: got '20', expected a whole number above 0"),
        ({"num_frames": True}, "num_frames: got True"),
        ({"split": "val"}, "split: got 'val', expected one of ('train', 'heldout')"),
        ({"source": 5}, "source: got 5"),
        ({"rollout": ""}, "rollout: got ''"),
        ({"seed": "a"}, "seed: got 'a'"),
        ({"licence": 5}, "licence: got 5"),
        ({"conditions": None}, "conditions: got None"),
        ({"captions": None}, "captions: got None"),
        ({"captions": {"start_frame": "0"}}, "captions: got CaptionWindow(start_frame='0'"),
        ({"captions": {"start_frame": 10}}, "captions: got CaptionWindow(start_frame=10, end_frame=10"),
        ({"captions": {"text": None}}, "captions: got CaptionWindow(start_frame=0"),
        ({"conditions": {"actions": [0.0] * 19}}, "actions[0]: got 0.0, expected a list"),
        ({"conditions": {"actions": [[0.0] * 6] * 19}}, "actions[0]: got 6 entries, expected 7"),
        ({"conditions": {"actions": [[float("inf")] * 7] * 19}}, "actions[0][0]: got inf, expected a number"),
        ({"conditions": {"controls": [["1"]] * 19}}, "controls[0][0]: got '1', expected a number"),
        ({"conditions": {"camera_poses": [[[0.0] * 4] * 3] * 20}}, "camera_poses[0]: got 3 entries, expected 4"),
        ({"conditions": {"intrinsics": [[1.0, 0.0], [0.0, 1.0]]}}, "intrinsics: got 2 entries, expected 3"),
        ({"conditions": {"view": 1}}, "view: got 1"),
    ],
)
def test_wrong_sidecar_is_told(tmp_path: Path, config: CurationConfig, change: dict | None, reason: str) -> None:
    path = write_simulated(tmp_path / "in", "drive", simulated_video(20), seed=0)
    wrong = {"source": "street"} if change is None else simulated_video(20).to_dict() | change
    if change and change.get("conditions"):
        wrong["conditions"] = {"view": "front"} | change["conditions"]
    if change and change.get("captions"):
        told = {"start_frame": 0, "end_frame": 10, "text": "A street.", "captioner": "simulator"}
        wrong["captions"] = [told | change["captions"]]
    write_json(path.with_suffix(".json"), wrong)
    (span,) = plan_spans(tmp_path / "in", tmp_path / "out", config)
    assert reason in span.error


@pytest.mark.parametrize(
    ("num_frames", "cap", "expected"),
    [
        (25, None, [(0, None, None)]),
        (100, None, [(0, 30, None), (30, 60, None), (60, None, None)]),
        (100, 7, [(0, 30, 3), (30, 60, 2), (60, None, 2)]),
        (300, 2, [(0, 30, 1), (30, 270, 0), (270, None, 1)]),
        (300, 1, [(0, 30, 1), (30, None, 0)]),
        (0, None, [(0, None, None)]),
    ],
)
def test_long_videos_become_spans(config: CurationConfig, num_frames: int, cap: int | None, expected: list) -> None:
    config = replace(config, span_s=3.0, max_clips_per_video=cap)
    assert _borders(VideoInfo(fps=10.0, num_frames=num_frames), config) == expected


def test_key_changes_with_file_sidecar_and_settings(tmp_path: Path, config: CurationConfig) -> None:
    path = write_simulated(tmp_path / "in", "drive", simulated_video(20), seed=0)

    def key(config: CurationConfig = config) -> str:
        return plan_spans(tmp_path / "in", tmp_path / "out", config)[0].key

    first = key()
    assert key() == first
    assert key(replace(config, gop=4)) != first
    assert key(replace(config, dedup_similarity=0.5)) == first
    write_json(path.with_suffix(".json"), replace(simulated_video(20), seed=9).to_dict())
    second = key()
    os.utime(path, (1, 1))
    assert len({first, second, key()}) == 3


def test_files_are_opened_beside_each_other_and_once_in_a_run(
    videos: Path, tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, together, probe = [], threading.Barrier(3), reader.probe

    def probed(path: str, **limits: int) -> VideoInfo:
        together.wait(timeout=60)
        opened.append(Path(path).name)
        return probe(path, **limits)

    monkeypatch.setattr(reader, "probe", probed)
    curate(videos, tmp_path / "out", config, progress=False)
    assert sorted(opened) == ["beach.mp4", "drive_a.mp4", "drive_b.mp4"]


def test_captioner_simulator_needs_captions_everywhere(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    spans = plan_spans(videos, tmp_path / "out", config)
    with pytest.raises(UserError, match="holiday/beach.mp4"):
        check_captions(spans)
    check_captions([s for s in spans if s.simulated])
