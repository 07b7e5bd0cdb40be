"""What the diffusion decoder adds: the same tokens decoded by it and by their own tokenizer, on held-out videos."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.perceptual import LpipsLike
from nemo_cosmos.evaluation.reconstruction import VideoMeasures, VideoMeter
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.generation.diffusion_decoder import DecodingConfig, open_diffusion_decoder
from nemo_cosmos.html_page import frame_sheet
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.steps.evaluate_tokenizer import reconstruct
from nemo_cosmos.steps.heldout import HeldOutWindow, held_out_windows
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.video_io import to_model, to_pixels

TRUTH, OWN, DIFFUSION, CEILING = "original", "discrete tokenizer", "diffusion decoder", "continuous tokenizer"
"""Names of the methods in results; the last one, which sees the video, bounds what its latents can hold."""
MEASURES = ("psnr_db", "ssim", "lpips_like")
_SHEET_COLUMNS = 5


def evaluate_decoder(
    curated: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path,
    discrete_tokenizer: str | Path,
    tokenizer: str | Path = "tokenizer_tiny",
    decoding: DecodingConfig | None = None,
    num_clips: int = 32,
    num_frames: int = 17,
    height: int = 128,
    width: int = 128,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Decodes held-out windows' tokens both ways, and compares with the windows.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder for `measures.json` (means, each window's measures, and of the diffusion decoder what it has more
            than the discrete tokenizer, window by window) and `sheet.png`.
        checkpoint: The diffusion decoder: anything `find_diffusion_decoder` takes.
        discrete_tokenizer: Makes the tokens: anything `load_tokenizer` takes.
        tokenizer: The continuous one.
        decoding: How the diffusion decoder samples.
        num_clips: At most this many windows.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.
        batch_size: Windows decoded at once.

    Returns:
        `methods`: mean of each measure by method, with the seconds that decoding one window took; `differences`: mean
        of what the diffusion decoder has more, and its standard error.

    Raises:
        UserError: There is no such window, the discrete tokenizer is none or not the decoder's, or as
            `open_diffusion_decoder`.
    """
    discrete = load_tokenizer(discrete_tokenizer).model.to(current_device())
    if discrete.tokenizer_config.levels is None:
        raise user_error("discrete tokenizer", str(discrete_tokenizer), "one with codes", "Give a DV tokenizer.")
    windows = held_out_windows(
        curated, num_windows=num_clips, num_frames=num_frames, height=height, width=width, with_actions=False
    )
    continuous = load_tokenizer(tokenizer).model.to(current_device())
    with open_diffusion_decoder(checkpoint, tokenizer) as decoder:
        decoder.check_tokens_of(discrete.fingerprint())

        def decode(tokens: torch.Tensor, batch: Sequence[HeldOutWindow], start: int) -> torch.Tensor:
            seed = (decoding or DecodingConfig()).seed
            seeds = [seed + start + i for i in range(len(batch))]  # batches change nothing
            return decoder.decode(tokens, decoding, prompts=[window.caption for window in batch], seeds=seeds)

        tokens = [_tokens(discrete, window) for window in windows]
        videos = {
            OWN: _timed(
                lambda batch, start: discrete.decode(torch.cat(tokens[start : start + len(batch)])), windows, 1
            ),
            DIFFUSION: _timed(
                lambda batch, start: decode(torch.cat(tokens[start : start + len(batch)]), batch, start),
                windows,
                batch_size,
            ),
        }
    ceiling = [reconstruct(continuous, window.frames) for window in windows]
    by_method = {name: frames for name, (frames, _) in videos.items()} | {CEILING: ceiling}
    measured = _measure(windows, by_method)
    result = {
        "methods": {name: _means(of_method) for name, of_method in measured.items()},
        "differences": _differences(measured),
        "num_clips": len(windows),
    }
    for name, (_, seconds) in videos.items():
        result["methods"][name]["seconds"] = seconds
    records = {name: [video.to_dict() for video in of_method] for name, of_method in measured.items()}
    write_json(Path(output) / "measures.json", {**result, "videos": records})
    _write_sheet(Path(output) / "sheet.png", windows, by_method)
    return result


def _tokens(discrete: CausalVideoTokenizer, window: HeldOutWindow) -> torch.Tensor:
    with torch.inference_mode():
        return discrete.encode(to_model(window.frames)[None].to(next(discrete.parameters()).device))


def _timed(
    decode: Callable[[Sequence[HeldOutWindow], int], torch.Tensor], windows: Sequence[HeldOutWindow], batch_size: int
) -> tuple[list[np.ndarray], float]:
    """Frames of all windows, and the seconds that one took."""
    videos, begun = [], time.perf_counter()
    for start in range(0, len(windows), batch_size):
        with torch.inference_mode():
            videos += [to_pixels(video) for video in decode(windows[start : start + batch_size], start)]
    return videos, (time.perf_counter() - begun) / len(windows)


def _measure(
    windows: Sequence[HeldOutWindow], by_method: dict[str, list[np.ndarray]]
) -> dict[str, list[VideoMeasures]]:
    perceptual = LpipsLike().to(current_device())
    measured: dict[str, list[VideoMeasures]] = {}
    for name, videos in by_method.items():
        measured[name] = []
        for number, (window, video) in enumerate(zip(windows, videos, strict=True)):
            meter = VideoMeter(len(window.frames), perceptual=perceptual)
            meter.add(window.frames, video)
            measured[name].append(meter.finish(name=f"window {number}", source=window.source))
    return measured


def _means(videos: Sequence[VideoMeasures]) -> dict[str, float]:
    return {name: float(np.mean([getattr(video, name) for video in videos])) for name in MEASURES}


def _differences(measured: dict[str, list[VideoMeasures]]) -> dict[str, dict[str, float | None]]:
    """What the diffusion decoder has more than the discrete tokenizer, paired by window."""
    differences: dict[str, dict[str, float | None]] = {}
    for name in MEASURES:
        pairs = zip(measured[DIFFUSION], measured[OWN], strict=True)
        more = np.array([getattr(decoded, name) - getattr(own, name) for decoded, own in pairs])
        error = float(more.std(ddof=1) / len(more) ** 0.5) if len(more) > 1 else None
        differences[name] = {"mean": float(more.mean()), "standard_error": error}
    return differences


def _write_sheet(path: Path, windows: Sequence[HeldOutWindow], by_method: dict[str, list[np.ndarray]]) -> None:
    """Frames of the first window of each domain, one row a method."""
    from PIL import Image

    firsts = {window.source: number for number, window in reversed(list(enumerate(windows)))}
    rows, labels = [], []
    for source, number in sorted(firsts.items()):
        rows += [windows[number].frames, *(videos[number] for videos in by_method.values())]
        labels += [f"{source}\n{name}" for name in (TRUTH, *by_method)]
    with written_aside(path) as aside:
        Image.fromarray(frame_sheet(rows, labels, columns=_SHEET_COLUMNS)).save(aside, format="PNG")
