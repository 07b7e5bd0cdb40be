"""Coding videos of any length and size, chunk by chunk, with the same result as in one pass.

`encode_stream` and `decode_stream` take and give chunks; `encode_video`, `decode_video` and `decode_frames` cut a whole
video into chunks, pad it to what the compression divides, and cut the padding off again.

Memory does not grow with the video, but for one thing that the architecture asks for: temporal attention in the middle
block sees all latent frames before, so encoder and decoder each keep a key and a value, 2 channels channels_mult[-1]
numbers, of every pixel of every latent frame. With CV8x8x8-720p in bf16 that is 29 MB for each 8 frames of 1280x720.
`max_attended_frames` bounds it, and the result is then no longer exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.causal_cache import CausalCache
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, Tokenizer, check_video_shape
from nemo_cosmos.tokenizer.tiling import Place, Tiling, code_tiles
from nemo_cosmos.video_io import to_model, to_pixels

Mode = Literal["causal", "windows"]
"""`causal`: chunks continue each other, as in one pass. `windows`: each is coded alone, with seams between them."""


@dataclass(frozen=True, kw_only=True)
class CodedVideo:
    """A video's latent and what decoding needs to cut the padding off."""

    latent: Tensor
    """[B, C, T', H', W'] or [B, T', H', W'] as the tokenizer's `encode` gives it, of the padded video."""
    num_frames: int
    """Frames of the video."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    window_frames: int | None = None
    """Frames of each window that was coded alone; None for one causal latent."""


def encode_stream(
    tokenizer: CausalVideoTokenizer,
    chunks: Iterable[Tensor],
    *,
    tiling: Tiling | None = None,
    max_attended_frames: int | None = None,
) -> Iterator[Tensor]:
    """Encodes a video that comes in chunks; the latents joined along time are those of one pass.

    Args:
        tokenizer: The tokenizer; no gradient is kept.
        chunks: Float [B, 3, T, H, W] in [-1, 1] on the tokenizer's device and in its dtype: first 1 + k c_t frames,
            then k c_t each, where every chunk has its own k. H and W divisible by the spatial compression.
        tiling: Codes tile by tile, which is not exact; None codes whole pictures.
        max_attended_frames: Bounds temporal attention, which is not exact; None for all frames (`CausalCache`).

    Yields:
        Latent [B, latent_channels, 1 + k or k, H / c_s, W / c_s] of each chunk; indices have no channels.

    Raises:
        UserError: A chunk does not fit the compression or the chunks before, or an option is out of range.
    """
    config = tokenizer.tokenizer_config
    cells = (config.spatial_compression, 1)
    return _coded(tokenizer.encode, chunks, tiling, cells, max_attended_frames)


def decode_stream(
    tokenizer: CausalVideoTokenizer,
    latent_chunks: Iterable[Tensor],
    *,
    tiling: Tiling | None = None,
    max_attended_frames: int | None = None,
) -> Iterator[Tensor]:
    """Decodes a latent that comes in chunks; the frames joined along time are those of one pass.

    Args:
        tokenizer: The tokenizer; no gradient is kept.
        latent_chunks: Float [B, latent_channels, n, H', W'] of any n > 0 in the tokenizer's dtype, or integer
            [B, n, H', W'] of a discrete one; on the tokenizer's device.
        tiling: Codes tile by tile, which is not exact; None codes whole pictures.
        max_attended_frames: Bounds temporal attention, which is not exact; None for all frames (`CausalCache`).

    Yields:
        Float [B, 3, n c_t, H, W] for each chunk; for the first chunk 1 + (n - 1) c_t frames.

    Raises:
        UserError: A chunk is no latent of this tokenizer or does not fit the chunks before, or an option is out of
            range.
    """
    config = tokenizer.tokenizer_config
    cells = (1, config.spatial_compression)
    return _coded(tokenizer.decode, latent_chunks, tiling, cells, max_attended_frames)


def _coded(
    code: Callable[[Tensor, CausalCache], Tensor],
    chunks: Iterable[Tensor],
    tiling: Tiling | None,
    cells: tuple[int, int],
    max_attended_frames: int | None,
) -> Iterator[Tensor]:
    """Runs `code` over chunks, with one cache for each tile; `cells` are entries per latent pixel in and out."""
    caches: dict[Place, CausalCache] = defaultdict(lambda: CausalCache(max_attended_frames=max_attended_frames))

    # On the chunk and not on the generator, whose wrapper would hold the last result while the next one is made.
    @torch.no_grad()
    def code_chunk(chunk: Tensor) -> Tensor:
        if tiling is None:
            return code(chunk, caches[0, 0])
        cell_in, cell_out = cells
        return code_tiles(
            chunk,
            lambda tile, place: code(tile, caches[place]),
            tiling,
            cell=max(cells),
            cell_in=cell_in,
            cell_out=cell_out,
        )

    expected: tuple[int, ...] | None = None
    for chunk in chunks:
        expected = _check_continues(chunk, expected)
        yield code_chunk(chunk)


def _check_continues(chunk: Tensor, expected: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the chunk's shape with the time left out, the same for all chunks."""
    if chunk.ndim < 4 or chunk.shape[-3] < 1:
        raise user_error("chunk shape", tuple(chunk.shape), "[B, C, T, H, W] with T > 0", "Leave empty chunks out.")
    shape = (*chunk.shape[:-3], *chunk.shape[-2:])
    if expected is not None and shape != expected:
        raise user_error("chunk shape without time", shape, f"{expected}, as before", "Stream one video at a time.")
    return shape


class StreamingEncoder:
    """A tokenizer for the latent cache that encodes long windows chunk by chunk, equal to one pass in less memory.

    Args:
        tokenizer: The tokenizer; no gradient is kept.
        chunk_frames: Frames coded at a time, a multiple of c_t; the first chunk has one more.

    Raises:
        UserError: It is a tokenizer of images, or `chunk_frames` is no multiple of c_t.
    """

    def __init__(self, tokenizer: Tokenizer, *, chunk_frames: int = 16) -> None:
        if not isinstance(tokenizer, CausalVideoTokenizer):
            raise user_error("tokenizer", type(tokenizer).__name__, "a video tokenizer", "Give a CV or DV one.")
        _check_chunk_frames(tokenizer, chunk_frames)
        self._tokenizer, self._chunk_frames = tokenizer, chunk_frames

    def check(self, num_frames: int, height: int, width: int) -> None:
        """Refuses videos of a size that cannot be encoded.

        Raises:
            UserError: The size does not fit the compression; nothing is padded.
        """
        config = self._tokenizer.tokenizer_config
        check_video_shape(config, (1, config.in_channels, num_frames, height, width))

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """As `CausalVideoTokenizer.encode`, for a whole video.

        Raises:
            UserError: The shape does not fit the compression; nothing is padded.
        """
        check_video_shape(self._tokenizer.tokenizer_config, tuple(video_BCTHW.shape))
        (spans,) = _streams(video_BCTHW.shape[2], self._chunk_frames, alone=False)
        return torch.cat(list(encode_stream(self._tokenizer, (video_BCTHW[:, :, span] for span in spans))), dim=-3)


def encode_video(
    tokenizer: CausalVideoTokenizer,
    video: np.ndarray | Tensor,
    *,
    chunk_frames: int = 16,
    mode: Mode = "causal",
    tiling: Tiling | None = None,
    max_attended_frames: int | None = None,
) -> CodedVideo:
    """Encodes a whole video of any length and size; only one chunk of it is on the tokenizer's device at a time.

    The video is padded to 1 + k c_t frames at its end and to multiples of c_s at the bottom and the right, by repeating
    the last frame, row and column. So pixel 0 and frame 0 stay at latent 0, as the rule for the first frame asks; and
    repetition, unlike reflection, can add more than there is. The reference instead centres the picture between black
    borders, on a multiple of 16 pixels, and repeats frames at both ends.

    Args:
        tokenizer: The tokenizer; no gradient is kept.
        video: uint8 [T, H, W, 3], or float [B, 3, T, H, W] in [-1, 1].
        chunk_frames: Frames coded at a time, a multiple of c_t; the first chunk has one more.
        mode: `causal`; or `windows` of 1 + chunk_frames frames, each coded alone as the reference does (17 frames with
            the default), for comparison: there are seams between them.
        tiling: Codes tile by tile, which is not exact; None codes whole pictures.
        max_attended_frames: Bounds temporal attention, which is not exact; None for all frames (`CausalCache`).

    Returns:
        The latent, on the tokenizer's device, and the video's size.

    Raises:
        UserError: The video has another shape or dtype, or an option is out of range.

    Source: NVIDIA cosmos-predict1, `tokenizer/inference/video_lib.py` for the windows.
    """
    num_frames, height, width = _video_size(video, tokenizer.tokenizer_config.in_channels)
    _check_chunk_frames(tokenizer, chunk_frames)
    if mode not in ("causal", "windows"):
        raise user_error("mode", mode, "'causal' or 'windows'", "Choose one of these.")
    alone = mode == "windows"
    latents: list[Tensor] = []
    for spans in _streams(num_frames, chunk_frames, alone=alone):
        chunks = (pad_chunk(tokenizer, _cut(video, span), starts=span is spans[0]) for span in spans)
        latents += encode_stream(tokenizer, chunks, tiling=tiling, max_attended_frames=max_attended_frames)
    return CodedVideo(
        latent=torch.cat(latents, dim=-3),
        num_frames=num_frames,
        height=height,
        width=width,
        window_frames=1 + chunk_frames if alone else None,
    )


def decode_video(
    tokenizer: CausalVideoTokenizer,
    coded: CodedVideo,
    *,
    chunk_frames: int = 16,
    tiling: Tiling | None = None,
    max_attended_frames: int | None = None,
) -> Tensor:
    """Decodes what `encode_video` gave and cuts the padding off.

    Args:
        tokenizer: The tokenizer; no gradient is kept.
        coded: The latent and the video's size.
        chunk_frames: Frames made at a time, a multiple of c_t; the first chunk has one more. Windows have their own.
        tiling: Codes tile by tile, which is not exact; None codes whole pictures.
        max_attended_frames: Bounds temporal attention, which is not exact; None for all frames (`CausalCache`).

    Returns:
        Float [B, 3, T, H, W], about [-1, 1] but not clamped, on the device of the coded latent.

    Raises:
        UserError: The latent is not this tokenizer's or too small for the size, or an option is out of range.
    """
    chunks = _decoded(tokenizer, coded, chunk_frames, tiling, max_attended_frames)
    return torch.cat([chunk.to(coded.latent.device) for chunk in chunks], dim=-3)


def decode_frames(
    tokenizer: CausalVideoTokenizer,
    coded: CodedVideo,
    *,
    chunk_frames: int = 16,
    tiling: Tiling | None = None,
    max_attended_frames: int | None = None,
) -> np.ndarray:
    """As `decode_video`, for one video, as uint8 [T, H, W, 3]; never holds more than a chunk in floating point.

    Raises:
        UserError: As `decode_video`, or the latent holds several videos.
    """
    if coded.latent.shape[0] != 1:
        raise user_error("number of videos", coded.latent.shape[0], "1", "Decode them one by one, or as tensors.")
    chunks = _decoded(tokenizer, coded, chunk_frames, tiling, max_attended_frames)
    return np.concatenate([to_pixels(chunk[0]) for chunk in chunks])


def _decoded(
    tokenizer: CausalVideoTokenizer,
    coded: CodedVideo,
    chunk_frames: int,
    tiling: Tiling | None,
    max_attended_frames: int | None,
) -> Iterator[Tensor]:
    """Yields the frames chunk by chunk, without padding."""
    _check_chunk_frames(tokenizer, chunk_frames)
    alone = coded.window_frames is not None
    stride = chunk_frames if coded.window_frames is None else coded.window_frames - 1
    stride //= tokenizer.tokenizer_config.temporal_compression
    streams = _streams(coded.latent.shape[-3], stride, alone=alone)
    _check_size(tokenizer, coded, streams)
    num_left = coded.num_frames
    for spans in streams:
        latents = (_placed(tokenizer, coded.latent[..., span, :, :]) for span in spans)
        for chunk in decode_stream(tokenizer, latents, tiling=tiling, max_attended_frames=max_attended_frames):
            yield chunk[:, :, :num_left, : coded.height, : coded.width]
            num_left -= min(num_left, chunk.shape[2])


def _streams(length: int, stride: int, *, alone: bool) -> list[list[slice]]:
    """Cuts time into streams of chunks: one stream of 1 + stride, stride, ..., or streams of one 1 + stride each."""
    edges = [0, *range(1 + stride, length, 1 + stride if alone else stride), length]
    spans = [slice(start, stop) for start, stop in pairwise(edges)]
    return [[span] for span in spans] if alone else [spans]


def _cut(video: np.ndarray | Tensor, span: slice) -> Tensor:
    """Returns some frames as float [B, 3, T, H, W]."""
    return to_model(video[span])[None] if isinstance(video, np.ndarray) else video[:, :, span]


def pad_chunk(tokenizer: Tokenizer, chunk_BCTHW: Tensor, *, starts: bool) -> Tensor:
    """Brings a chunk to the tokenizer and pads it, by its last frame, row and column, to what the compression divides.

    Args:
        tokenizer: Where the result is for.
        chunk_BCTHW: Float [B, 3, T, H, W].
        starts: Whether it is a video's first chunk.

    Returns:
        Float, with 1 + k c_t frames where it starts and k c_t where it goes on, of H and W divisible by c_s.
    """
    config = tokenizer.tokenizer_config
    _, _, num_frames, height, width = chunk_BCTHW.shape
    missing_t = -(num_frames - starts) % config.temporal_compression
    missing_h, missing_w = (-size % config.spatial_compression for size in (height, width))
    chunk_BCTHW = _placed(tokenizer, chunk_BCTHW)
    return F.pad(chunk_BCTHW, (0, missing_w, 0, missing_h, 0, missing_t), mode="replicate")


def _placed(tokenizer: Tokenizer, x: Tensor) -> Tensor:
    """Brings a tensor to the tokenizer's device and, where it holds real numbers, its dtype."""
    weight = next(tokenizer.parameters())
    return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)


def _video_size(video: np.ndarray | Tensor, channels: int) -> tuple[int, int, int]:
    """Returns frames, height and width."""
    if isinstance(video, np.ndarray):
        fits = video.ndim == 4 and video.shape[-1] == channels and video.dtype == np.uint8
        size = video.shape[:3]
    else:
        fits = video.ndim == 5 and video.shape[1] == channels and video.is_floating_point()
        size = tuple(video.shape[2:])
    if not fits or 0 in video.shape:
        expected = f"uint8 [T, H, W, {channels}] or float [B, {channels}, T, H, W], none empty"
        raise user_error("video", f"{video.dtype} {tuple(video.shape)}", expected, "Convert it, or reorder its axes.")
    num_frames, height, width = size
    return num_frames, height, width


def _check_chunk_frames(tokenizer: CausalVideoTokenizer, chunk_frames: int) -> None:
    step = tokenizer.tokenizer_config.temporal_compression
    if chunk_frames < 1 or chunk_frames % step:
        raise user_error("chunk_frames", chunk_frames, f"a multiple of {step}", "Round it.")


def _check_size(tokenizer: CausalVideoTokenizer, coded: CodedVideo, streams: list[list[slice]]) -> None:
    """Refuses a size that the latent does not hold."""
    config = tokenizer.tokenizer_config
    latent_frames = (spans[-1].stop - spans[0].start for spans in streams)
    held = {
        "num_frames": sum(1 + (length - 1) * config.temporal_compression for length in latent_frames),
        "height": coded.latent.shape[-2] * config.spatial_compression,
        "width": coded.latent.shape[-1] * config.spatial_compression,
    }
    for name, most in held.items():
        if not 1 <= getattr(coded, name) <= most:
            raise user_error(name, getattr(coded, name), f"1 to {most} with this latent", "Give the video's own size.")
