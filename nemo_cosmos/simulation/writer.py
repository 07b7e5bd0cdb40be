"""Rollouts on disk: one mp4 and one sidecar per camera; the sidecar comes last and marks the pair complete."""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.contracts import Conditions, RawVideo
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.simulation.rollout import Rollout
from nemo_cosmos.video_io import write_video


def video_paths(output_dir: Path, source: str, name: str, cameras: tuple[str, ...]) -> dict[str, Path]:
    """Names the files of a rollout.

    Args:
        output_dir: Root of the collection.
        source: Domain; the folder.
        name: The rollout's name.
        cameras: Its cameras.

    Returns:
        Camera to `<output_dir>/<source>/<name>.mp4`, or `<name>__<camera>.mp4` where there are several.
    """
    folder = output_dir / source
    if len(cameras) == 1:
        return {cameras[0]: folder / f"{name}.mp4"}
    return {camera: folder / f"{name}__{camera}.mp4" for camera in cameras}


def is_complete(video: Path) -> bool:
    """Whether a video and a readable sidecar of it are there."""
    sidecar = video.with_suffix(".json")
    if not (video.is_file() and sidecar.is_file()):
        return False
    try:
        read_sidecar(video)
    except UserError:
        return False
    return True


def read_sidecar(video: Path) -> RawVideo:
    """Reads the record beside a video.

    Raises:
        UserError: It is missing or not a `RawVideo`.
    """
    sidecar = video.with_suffix(".json")
    try:
        return RawVideo.from_dict(read_json(sidecar))
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{sidecar}: not a video's sidecar ({error}). Delete it and collect again.") from error


def write_rollout(output_dir: Path, rollout: Rollout) -> list[Path]:
    """Writes all cameras of a rollout.

    Args:
        output_dir: Root of the collection.
        rollout: What to write.

    Returns:
        The mp4 paths.
    """
    paths = video_paths(output_dir, rollout.source, rollout.name, tuple(rollout.cameras))
    for view, path in paths.items():
        track = rollout.cameras[view]
        path.with_suffix(".json").unlink(missing_ok=True)
        write_video(path, track.frames, fps=rollout.fps)
        record = RawVideo(
            source=rollout.source,
            rollout=rollout.name,
            fps=rollout.fps,
            num_frames=rollout.num_frames,
            split=rollout.split,
            captions=rollout.captions,
            conditions=Conditions(
                actions=rollout.actions.round(7).tolist(),
                controls=rollout.controls.round(7).tolist(),
                camera_poses=track.poses.round(7).tolist(),
                intrinsics=track.intrinsics.tolist(),
                view=view,
            ),
            seed=rollout.seed,
            licence="made by this project's simulators",
        )
        write_json(path.with_suffix(".json"), record.to_dict())
    return list(paths.values())
