"""How well a tokenizer rebuilds videos and pictures, at what rate, and how that compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.clip_features import FEATURES, ClipFeatures
from nemo_cosmos.evaluation.codebook import code_bits, codebook_use, count_codes
from nemo_cosmos.evaluation.codec_baselines import LatentRate, bicubic, block_dct
from nemo_cosmos.evaluation.frechet import frechet_distance
from nemo_cosmos.evaluation.perceptual import LpipsLike
from nemo_cosmos.evaluation.rate_distortion import CODECS, CRFS, Codec, RatePoint, encode_with, mean_curve
from nemo_cosmos.evaluation.reconstruction import VideoMeasures, VideoMeter, mean_seams
from nemo_cosmos.evaluation.tokenizer_report import (
    FrechetResult,
    SheetRow,
    TokenizerEvaluation,
    write_tokenizer_report,
)
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.steps.heldout import HeldOutWindow, held_out_windows
from nemo_cosmos.steps.video_source import VideoSource, files_of, is_curated, windows_as_sources
from nemo_cosmos.tokenizer.load import LoadedTokenizer
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, Tokenizer
from nemo_cosmos.tokenizer.reconstruction import STORED_DTYPE, CodingConfig, rebuild_stream
from nemo_cosmos.video_io import to_model, to_pixels

_SHEET_ROWS = 8
_PUBLISHED_WINDOW = 17
"""Frames of the published inference code's windows; seams are looked for there when the video is one stream."""


def evaluate_tokenizer(
    data: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path = "tokenizer_tiny",
    coding: CodingConfig | None = None,
    max_frames: int | None = None,
    fast: bool = False,
    num_clips: int = 32,
    num_frames: int = 17,
    height: int = 128,
    width: int = 128,
) -> dict[str, Any]:
    """Measures reconstructions, and writes `measures.json`, `sheet.png`, `rate_distortion.png` and `report.html`.

    A file that cannot be read is noted with the reason, and the others are measured all the same.

    Args:
        data: A folder of videos and pictures of any size and length, each coded whole; or one that
            `nemo-cosmos curate` wrote, of which held-out windows are taken, and bicubic and block DCT coding compared.
        output: Folder to write to.
        tokenizer: Anything `load_tokenizer` takes.
        coding: How videos are cut for coding.
        max_frames: At most so many frames of each file.
        fast: Leaves out what takes most of the time: the Fréchet distance, and the video codecs' curves.
        num_clips: Of a curated folder, at most this many windows.
        num_frames: Of a curated folder, frames per window.
        height: Of a curated folder, pixels.
        width: Of a curated folder, pixels.

    Returns:
        `TokenizerEvaluation.summary`, and the `report`'s path.

    Raises:
        UserError: There is nothing to measure, or nothing of it can be.
    """
    loaded, coding = load_tokenizer(tokenizer), coding or CodingConfig()
    measurer = _Measurer(loaded, coding, fast=fast)
    windows: list[HeldOutWindow] = []
    if is_curated(data):
        windows = held_out_windows(
            data, num_windows=num_clips, num_frames=num_frames, height=height, width=width, with_actions=False
        )
    sources = windows_as_sources(windows) if windows else files_of(data, max_frames=max_frames)
    measured, failed = measurer.measure_all(sources)
    rate = None
    baselines: dict[str, dict[str, float]] = {}
    if windows and measurer.codebook_size is None:
        rate = _rate_of(loaded.model)
        baselines = measurer.measure_baselines(windows, rate)
    videos = [m.video for m in measured]
    evaluation = TokenizerEvaluation(
        tokenizer=loaded.name,
        fingerprint=loaded.model.fingerprint(),
        data=str(data),
        coding=coding.describe(),
        stored_as=measurer.stored_as,
        methods={"tokenizer": _means(videos), **baselines},
        by_source=_psnr_by_source(videos),
        num_clips=len(videos),
        num_stored=None if rate is None else rate.num_stored(num_frames, height, width),
        bits_per_pixel=float(np.mean([video.bits_per_pixel for video in videos])),
        codebook=None if measurer.counts is None else codebook_use(measurer.counts),
        frechet=_frechet([pair for m in measured for pair in m.features]),
        codecs={codec.name: mean_curve(m.curves[codec.name] for m in measured) for codec in measurer.codecs},
        crfs=CRFS,
        missing_codecs=measurer.missing_codecs,
        seams=mean_seams(videos),
        videos=tuple(videos),
        failed=failed,
    )
    report = write_tokenizer_report(output, evaluation, [m.row for m in measured if m.row is not None])
    return {**evaluation.summary(), "report": str(report)}


def reconstruct(model: CausalVideoTokenizer, frames: np.ndarray) -> np.ndarray:
    """Encodes and decodes one video, uint8 [T, H, W, 3]."""
    with torch.inference_mode():
        return to_pixels(model(to_model(frames)[None].to(next(model.parameters()).device))[0])


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What stays of a measured video."""

    video: VideoMeasures
    features: list[tuple[np.ndarray, np.ndarray]]
    curves: dict[str, tuple[RatePoint, ...]]
    """By codec."""
    row: SheetRow | None


class _Measurer:
    """A tokenizer and all that it is measured by."""

    def __init__(self, loaded: LoadedTokenizer, coding: CodingConfig, *, fast: bool) -> None:
        device = current_device()
        self._model, self._coding = loaded.model.to(device), coding
        self._perceptual = LpipsLike().to(device)
        self._features = None if fast else ClipFeatures(device)
        wanted: tuple[Codec, ...] = () if fast else CODECS
        self.codecs = [codec for codec in wanted if codec.is_available]
        self.missing_codecs = {
            codec.name: f"this build of PyAV has no {codec.encoder}" for codec in wanted if not codec.is_available
        }
        self.codebook_size: int | None = _codebook_size(loaded.model)
        self.counts: np.ndarray | None = None
        """How often each code occurs in the videos measured so far."""

    @property
    def stored_as(self) -> str:
        """What the bits count."""
        if self.codebook_size is None:
            name = str(STORED_DTYPE).removeprefix("torch.")
            return f"{8 * STORED_DTYPE.itemsize} for each number of the latent, {name} as in the latent cache"
        return f"log2({self.codebook_size:,}) for each token"

    def measure_all(self, sources: Sequence[VideoSource]) -> tuple[list[_Measured], dict[str, str]]:
        """Measures all that can be.

        Returns:
            Measures, and the reason by name for the others.

        Raises:
            UserError: None can be.
        """
        shown = set(np.linspace(0, len(sources) - 1, min(_SHEET_ROWS, len(sources))).round().astype(int).tolist())
        measured, failed = [], {}
        for number, source in enumerate(tqdm(sources, desc="evaluate", unit="video")):
            try:
                measured.append(self._measure(source, shown=number in shown))
            except UserError as error:
                failed[source.name] = str(error)
        if not measured:
            name, reason = next(iter(failed.items()))
            raise UserError(f"None of {len(failed)} files could be measured; the first, {name}: {reason}")
        return measured, failed

    def measure_baselines(self, windows: Sequence[HeldOutWindow], rate: LatentRate) -> dict[str, dict[str, float]]:
        """Measures plain coding that may keep as many numbers as the latent."""
        videos: dict[str, list[VideoMeasures]] = {"bicubic": [], "block DCT": []}
        for window in windows:
            for (name, of_method), code in zip(videos.items(), (bicubic, block_dct), strict=True):
                meter = VideoMeter(len(window.frames), perceptual=self._perceptual)
                meter.add(window.frames, code(window.frames, rate))
                of_method.append(meter.finish(name=name, source=window.source))
        return {name: _means(of_method) for name, of_method in videos.items()}

    def _measure(self, source: VideoSource, *, shown: bool) -> _Measured:
        num_frames, fps = source.probe()
        meter = VideoMeter(
            num_frames,
            perceptual=self._perceptual,
            features=self._features,
            window_frames=self._coding.temporal_window or _PUBLISHED_WINDOW,
        )
        bits, counts = 0.0, None
        for chunk in rebuild_stream(self._model, source.frames(), self._coding):
            meter.add(chunk.truth, chunk.rebuilt)
            bits += code_bits(chunk.code, self.codebook_size)
            if self.codebook_size is not None:
                counts = count_codes(chunk.code, self.codebook_size) + (0 if counts is None else counts)
        video = meter.finish(name=source.name, source=source.source, bits=bits)
        curves = {
            codec.name: tuple(encode_with(codec, source.frames, crf=crf, fps=fps) for crf in CRFS)
            for codec in self.codecs
        }
        if counts is not None:
            self.counts = counts + (0 if self.counts is None else self.counts)
        row = None
        if shown and meter.middle is not None:
            label = f"{video.name}, {video.psnr_db:.1f} dB at {video.bits_per_pixel:.3g} bits per pixel"
            row = SheetRow(label=label, truth=meter.middle[0], rebuilt=meter.middle[1])
        return _Measured(video=video, features=meter.features, curves=curves, row=row)


def _codebook_size(model: Tokenizer) -> int | None:
    """Number of codes of a discrete tokenizer, the product of its levels; None for a continuous one."""
    levels = model.tokenizer_config.levels
    return None if levels is None else math.prod(levels)


def _rate_of(model: Tokenizer) -> LatentRate:
    config = model.tokenizer_config
    return LatentRate(
        temporal=config.temporal_compression, spatial=config.spatial_compression, channels=config.latent_channels
    )


def _means(videos: Sequence[VideoMeasures]) -> dict[str, float]:
    return {
        name: float(np.mean([getattr(video, name) for video in videos])) for name in ("psnr_db", "ssim", "lpips_like")
    }


def _psnr_by_source(videos: Sequence[VideoMeasures]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for video in videos:
        values.setdefault(video.source, []).append(video.psnr_db)
    return {source: float(np.mean(of_source)) for source, of_source in sorted(values.items())}


def _frechet(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> FrechetResult | None:
    """Distance of original and rebuilt clips; None for fewer than two clips, which have no covariance."""
    if len(pairs) < 2:
        return None
    truth, rebuilt = (np.stack(features) for features in zip(*pairs, strict=True))
    return FrechetResult(
        distance=frechet_distance(truth, rebuilt),
        features=FEATURES,
        num_clips=len(pairs),
        num_features=truth.shape[1],
    )
