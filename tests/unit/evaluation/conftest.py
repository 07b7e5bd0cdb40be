from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.evaluation.report import MediaFile, QuickstartSummary, StepSummary, TokenizerRow
from nemo_cosmos.evaluation.video_prediction import PredictionEvaluation, evaluate_predictions, repeat_last_frame
from nemo_cosmos.html_page import frame_sheet
from nemo_cosmos.video_io import write_video


class MeanDifference:
    """A stand-in for the perceptual measure that costs nothing."""

    def frames(self, truth: np.ndarray, predictions: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.abs(truth.astype(float) - p).mean(axis=(1, 2, 3)) / 255 for p in predictions])


def _moving_square(*, seed: int, speed: float, num_frames: int = 17, size: int = 64) -> np.ndarray:
    """A smooth background with a bright square that moves right; uint8 [T, H, W, 3]."""
    generator = np.random.default_rng(seed)
    corners = generator.integers(40, 200, (2, 2, 3)).astype(np.uint8)
    background = np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BICUBIC))
    video = np.repeat(background[None], num_frames, axis=0)
    top = int(generator.integers(2, size - 16))
    for t in range(num_frames):
        left = round(4 + speed * t)
        video[t, top : top + 14, left : left + 14] = (240, 200, 40)
    return video


def _evaluation_of(predicted_speeds: dict[str, float], *, num_videos: int = 6) -> PredictionEvaluation:
    truth = [_moving_square(seed=seed, speed=2.5) for seed in range(num_videos)]
    predictions = {
        name: [_moving_square(seed=seed, speed=speed) for seed in range(num_videos)]
        for name, speed in predicted_speeds.items()
    }
    predictions["repeat last frame"] = [repeat_last_frame(video[:1], len(video)) for video in truth]
    return evaluate_predictions(truth, predictions, perceptual=MeanDifference())


@pytest.fixture
def mean_difference() -> MeanDifference:
    return MeanDifference()


@pytest.fixture
def moving_square() -> Callable[..., np.ndarray]:
    return _moving_square


@pytest.fixture
def evaluation_of() -> Callable[..., PredictionEvaluation]:
    return _evaluation_of


@pytest.fixture
def summary(tmp_path: Path) -> QuickstartSummary:
    """A small made-up run with its files in `tmp_path`."""
    generator = np.random.default_rng(0)
    for name in ("pretrain", "post_train"):
        losses = 0.2 + np.exp(-np.arange(200) / 40) + generator.normal(0, 0.05, 200)
        lines = [json.dumps({"step": step, "loss": float(loss)}) for step, loss in enumerate(losses)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    truth, model = _moving_square(seed=1, speed=2.5), _moving_square(seed=1, speed=2.3)
    sheet = frame_sheet(
        [truth, model, repeat_last_frame(truth[:1], 17)], ["truth", "model", "repeat\nlast frame"], columns=6
    )
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    for i in range(4):
        write_video(tmp_path / f"sample_{i}.mp4", _moving_square(seed=i, speed=2.5), fps=10)
    return QuickstartSummary(
        command="nemo-cosmos quickstart --output runs/quickstart",
        machine={"processor": "A processor @ 2.00GHz", "cores": "2", "memory": "8.0 GiB"},
        steps=(
            StepSummary(name="collect", seconds=41.0, peak_memory_mb=410.2, measures={"videos": 56, "hours": 0.31}),
            StepSummary(
                name="curate", seconds=128.4, peak_memory_mb=1320.0, measures={"clips kept": 188, "rejected": 41}
            ),
            StepSummary(name="pretrain", seconds=301.0, peak_memory_mb=2210.0, measures={"loss": 0.2213}),
        ),
        tokenizer=(
            TokenizerRow(method="CV8x8x8-tiny", num_stored=12288, psnr_db=27.31, ssim=0.842, lpips_like=0.131),
            TokenizerRow(method="bicubic", num_stored=12288, psnr_db=24.02, ssim=0.71),
        ),
        loss_logs=(
            MediaFile(path="pretrain.jsonl", caption="pretraining"),
            MediaFile(path="post_train.jsonl", caption="action post-training"),
        ),
        prediction=_evaluation_of({"WFM with actions": 2.4, "WFM without actions": 1.0}),
        action_sensitivity=_evaluation_of({"right actions": 2.4, "shuffled actions": 0.5}),
        frame_sheets=(MediaFile(path="sheet.png", caption="Held-out rollout street_007: truth, model, baseline"),),
        videos=tuple(MediaFile(path=f"sample_{i}.mp4", caption=f"Sample {i}, seed {i}") for i in range(4)),
        verdicts=(
            Verdict(guard="blocklist", safe=True, reason="no blocked word"),
            Verdict(guard="content", safe=False, reason="3 unsafe sampled frames in a row of 4, limit 3"),
        ),
    )
