from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from curator_stages import pipeline
from curator_stages.config import CurationConfig
from curator_stages.executor import make_executor
from nemo_cosmos.video_io import write_video
from tests.unit.curator_stages.samples import SIZE, moving_texture, simulated_video, write_simulated


@pytest.fixture
def config() -> CurationConfig:
    return CurationConfig(captioner="none", height=SIZE, width=SIZE, min_s=0.5, max_s=3.0, span_s=30.0, embed_frames=1)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares tests the start of worker processes, which would know of none of their patches either."""
    monkeypatch.setattr(
        pipeline, "make_executor", lambda *given, **how: make_executor(*given, **how | {"apart": False})
    )


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two simulated videos, one real one with a cut, one that is broken."""
    folder = tmp_path / "in"
    write_simulated(folder / "street", "drive_a", simulated_video(20, rollout="drive_a"), seed=1)
    write_simulated(folder / "street", "drive_b", simulated_video(20, rollout="drive_b", split="heldout"), seed=2)
    shots = np.concatenate([moving_texture(12, seed=3), moving_texture(12, seed=4)])
    write_video(folder / "holiday" / "beach.mp4", shots, fps=10)
    (folder / "holiday" / "broken.mp4").write_bytes(b"")
    return folder
