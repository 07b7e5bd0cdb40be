"""Rebuilding videos of any size and length as a stream: encoded, stored, decoded, beside the frames they came from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, ImageTokenizer
from nemo_cosmos.tokenizer.streaming import decode_stream, encode_stream, pad_chunk
from nemo_cosmos.tokenizer.tiling import Tiling, code_tiles
from nemo_cosmos.video_io import to_model, to_pixels

STORED_DTYPE = torch.bfloat16
"""What latents are rounded to between encoding and decoding: the latent cache keeps them so."""

_CHUNK_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class CodingConfig:
    """How a video is cut for coding; the defaults code it as in one pass, whole pictures in one causal stream."""

    temporal_window: int | None = None
    """Frames of windows that are coded alone, with seams between them, 1 + k c_t: 17 is what the published inference
    code does. None for one causal stream."""
    tile: int | None = None
    """Pixels along the edge of tiles that larger pictures are cut into, which is not exact; None codes whole ones."""
    max_attended_frames: int | None = None
    """Latent frames that temporal attention sees at most, which is not exact; None for all. Bounds the one thing that
    grows with a video's length."""

    def describe(self) -> str:
        """The cut in words."""
        time = "one causal stream" if self.temporal_window is None else f"windows of {self.temporal_window} frames"
        space = "whole pictures" if self.tile is None else f"tiles of {self.tile} pixels"
        seen = "" if self.max_attended_frames is None else f", attending to {self.max_attended_frames} latent frames"
        return f"{time}, {space}{seen}"


@dataclass(frozen=True, kw_only=True)
class RebuiltChunk:
    """Some frames and what became of them."""

    truth: np.ndarray
    """uint8 [T, H, W, 3]."""
    rebuilt: np.ndarray
    """The same shape, from the stored code."""
    code: Tensor
    """The code of these frames as stored, padding included: a latent in `STORED_DTYPE`, or indices."""


def rebuild_stream(
    tokenizer: CausalVideoTokenizer | ImageTokenizer, frames: Iterable[np.ndarray], coding: CodingConfig | None = None
) -> Iterator[RebuiltChunk]:
    """Encodes and decodes a video that comes frame by frame; holds two chunks of it at most.

    Args:
        tokenizer: The tokenizer; no gradient is kept. One of images codes every frame alone.
        frames: uint8 [H, W, 3] each, at least one; a picture is a video of one frame.
        coding: How to cut.

    Yields:
        The video chunk by chunk, in order, without padding.

    Raises:
        UserError: The cut does not suit the tokenizer.
    """
    coding = coding or CodingConfig()
    _check(tokenizer, coding)
    frames = iter(frames)
    if isinstance(tokenizer, ImageTokenizer):
        yield from (_rebuild_image(tokenizer, frame, coding) for frame in frames)
    elif coding.temporal_window is None:
        yield from _rebuild(tokenizer, _chunks(frames, first=1 + _CHUNK_FRAMES, then=_CHUNK_FRAMES), coding)
    else:
        for window in _chunks(frames, first=coding.temporal_window, then=coding.temporal_window):
            yield from _rebuild(tokenizer, iter([window]), coding)


def _rebuild(
    tokenizer: CausalVideoTokenizer, chunks: Iterator[np.ndarray], coding: CodingConfig
) -> Iterator[RebuiltChunk]:
    """Codes one causal stream; the pairs of iterators run in step, so each holds no more than the chunk at work."""
    options = {"tiling": _tiling(coding), "max_attended_frames": coding.max_attended_frames}
    truth, originals = itertools.tee(chunks)
    padded = (pad_chunk(tokenizer, to_model(o)[None], starts=i == 0) for i, o in enumerate(originals))
    stored, codes = itertools.tee(_stored(latent) for latent in encode_stream(tokenizer, padded, **options))
    decoded = decode_stream(tokenizer, (_unstored(tokenizer, code) for code in codes), **options)
    for original, code, video in zip(truth, stored, decoded, strict=True):
        num_frames, height, width, _ = original.shape
        rebuilt = to_pixels(video[0, :, :num_frames, :height, :width])
        yield RebuiltChunk(truth=original, rebuilt=rebuilt, code=code)


@torch.no_grad()
def _rebuild_image(tokenizer: ImageTokenizer, frame: np.ndarray, coding: CodingConfig) -> RebuiltChunk:
    """Codes one frame."""
    height, width = frame.shape[:2]
    image = pad_chunk(tokenizer, to_model(frame[None])[None], starts=True)[:, :, 0]
    tiling, cell = _tiling(coding), tokenizer.tokenizer_config.spatial_compression
    if tiling is None:
        code = _stored(tokenizer.encode(image))
        rebuilt = tokenizer.decode(_unstored(tokenizer, code))
    else:
        tiled = code_tiles(image, lambda x, _: tokenizer.encode(x), tiling, cell=cell, cell_in=cell, cell_out=1)
        code = _stored(tiled)
        latent = _unstored(tokenizer, code)
        rebuilt = code_tiles(latent, lambda x, _: tokenizer.decode(x), tiling, cell=cell, cell_in=1, cell_out=cell)
    return RebuiltChunk(truth=frame[None], rebuilt=to_pixels(rebuilt[0, :, None, :height, :width]), code=code)


def _tiling(coding: CodingConfig) -> Tiling | None:
    return None if coding.tile is None else Tiling(tile=coding.tile)


def _stored(code: Tensor) -> Tensor:
    return code.to(STORED_DTYPE) if code.is_floating_point() else code


def _unstored(tokenizer: CausalVideoTokenizer | ImageTokenizer, code: Tensor) -> Tensor:
    return code.to(next(tokenizer.parameters()).dtype) if code.is_floating_point() else code


def _chunks(frames: Iterator[np.ndarray], *, first: int, then: int) -> Iterator[np.ndarray]:
    """Stacks frames into [first, H, W, 3], then [then, H, W, 3] each, the last one shorter."""
    size = first
    while chunk := list(itertools.islice(frames, size)):
        yield np.stack(chunk)
        size = then


def _check(tokenizer: CausalVideoTokenizer | ImageTokenizer, coding: CodingConfig) -> None:
    step, window = tokenizer.tokenizer_config.temporal_compression, coding.temporal_window
    if isinstance(tokenizer, ImageTokenizer) and window is not None:
        raise user_error("temporal_window", window, "None for an image tokenizer", "It codes every frame alone.")
    if window is not None and (window <= step or (window - 1) % step):
        expected = f"1 + a multiple of {step}, more than 1"
        raise user_error("temporal_window", window, expected, "The published code takes 17.")
    if _CHUNK_FRAMES % step:
        raise user_error("temporal compression", step, f"a divisor of {_CHUNK_FRAMES}", "Use another tokenizer.")
