"""How well a tokenizer rebuilds held-out clips, beside plain coding at the same rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.evaluation.codec_baselines import LatentRate, bicubic, block_dct
from nemo_cosmos.evaluation.metrics import psnr, ssim
from nemo_cosmos.evaluation.perceptual import LpipsLike
from nemo_cosmos.files import write_json
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.steps.heldout import HeldOutWindow, held_out_windows
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.video_io import to_model, to_pixels


def evaluate_tokenizer(
    curated: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path = "tokenizer_tiny",
    num_clips: int = 32,
    num_frames: int = 17,
    height: int = 128,
    width: int = 128,
) -> dict[str, Any]:
    """Measures reconstructions of held-out windows.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: JSON to write.
        tokenizer: Anything `load_tokenizer` takes.
        num_clips: At most this many windows.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.

    Returns:
        `methods`: for each method the mean PSNR (dB), SSIM and LPIPS-like; `by_source`: the tokenizer's PSNR per
        domain; `num_clips`; `num_stored`: numbers kept per clip, the same for all methods.
    """
    model = load_tokenizer(tokenizer).model.to(current_device())
    windows = held_out_windows(
        curated, num_windows=num_clips, num_frames=num_frames, height=height, width=width, with_actions=False
    )
    config = model.tokenizer_config
    rate = LatentRate(
        temporal=config.temporal_compression, spatial=config.spatial_compression, channels=config.latent_channels
    )
    rebuilt = {
        "tokenizer": [reconstruct(model, window.frames) for window in windows],
        "bicubic": [bicubic(window.frames, rate) for window in windows],
        "block DCT": [block_dct(window.frames, rate) for window in windows],
    }
    result = {
        "methods": {name: _mean_measures(windows, videos) for name, videos in rebuilt.items()},
        "by_source": _psnr_by_source(windows, rebuilt["tokenizer"]),
        "num_clips": len(windows),
        "num_stored": rate.num_stored(num_frames, height, width),
    }
    write_json(output, result)
    return result


def reconstruct(model: CausalVideoTokenizer, frames: np.ndarray) -> np.ndarray:
    """Encodes and decodes one video, uint8 [T, H, W, 3]."""
    with torch.inference_mode():
        return to_pixels(model(to_model(frames)[None].to(next(model.parameters()).device))[0])


def _mean_measures(windows: list[HeldOutWindow], videos: list[np.ndarray]) -> dict[str, float]:
    perceptual = LpipsLike()
    pairs = [(window.frames, video) for window, video in zip(windows, videos, strict=True)]
    # The perceptual network costs a hundred times as much as the others: first, middle and last frame stand for all.
    sparse = [0, len(pairs[0][0]) // 2, len(pairs[0][0]) - 1]
    return {
        "psnr_db": float(np.mean([psnr(a, b).mean() for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b).mean() for a, b in pairs])),
        "lpips_like": float(np.mean([perceptual.frames(a[sparse], [b[sparse]])[0].mean() for a, b in pairs])),
    }


def _psnr_by_source(windows: list[HeldOutWindow], videos: list[np.ndarray]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for window, video in zip(windows, videos, strict=True):
        values.setdefault(window.source, []).append(float(psnr(window.frames, video).mean()))
    return {source: float(np.mean(of_source)) for source, of_source in sorted(values.items())}
