"""What plain signal processing reaches when it may store as many numbers as the tokenizer's latent holds.

A continuous tokenizer with compression t x s x s and C latent channels turns 1 + t*n frames of H x W into
C * (1 + n) * (H/s) * (W/s) numbers. Both baselines here keep at most that many; positions, sizes and block layout are
fixed rules and count nothing, and stored numbers are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.metrics import psnr


@dataclass(kw_only=True)
class LatentRate:
    """The rate that a baseline has to keep to."""

    temporal: int = 8
    """Frames per latent frame, the first frame standing alone."""
    spatial: int = 8
    """Pixels per latent pixel along each side."""
    channels: int = 16
    """Numbers per latent pixel."""

    def num_stored(self, num_frames: int, height: int, width: int) -> int:
        """How many numbers the latent of a video holds.

        Raises:
            UserError: The video's size is none that the tokenizer takes.
        """
        if (num_frames - 1) % self.temporal or height % self.spatial or width % self.spatial:
            raise user_error(
                "video size [T, H, W]",
                (num_frames, height, width),
                f"T = 1 + {self.temporal}n and H, W multiples of {self.spatial}",
                "Crop the video.",
            )
        latent_frames = 1 + (num_frames - 1) // self.temporal
        return self.channels * latent_frames * (height // self.spatial) * (width // self.spatial)


def bicubic(frames: np.ndarray, rate: LatentRate | None = None) -> np.ndarray:
    """Shrinks a video in time and space until it fits the rate, and enlarges it again.

    Both ways cubic, with an anti-aliasing filter on the way down. A kept pixel costs three numbers. How many frames
    are kept is tried out over T, T/2, T/4 ... and the best PSNR wins, so the baseline picks its own trade.

    Args:
        frames: uint8 [T, H, W, 3].
        rate: The tokenizer's; 8x8x8 with 16 channels by default.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        UserError: The video's size is none that the tokenizer takes.
    """
    num_frames, height, width = frames.shape[:3]
    budget = (rate or LatentRate()).num_stored(num_frames, height, width) // 3
    video = rearrange(torch.from_numpy(frames).float(), "t h w c -> c t h w")
    counts = sorted({-(-num_frames // 2**k) for k in range(num_frames.bit_length() + 1)})
    tried = []
    for kept in counts:
        side = min(1.0, (budget / kept / (height * width)) ** 0.5)
        if side * min(height, width) >= 1:
            small = _cubic(video, kept, int(height * side), int(width * side))
            large = _cubic(small, num_frames, height, width).round().clamp(0, 255)
            tried.append(rearrange(large, "c t h w -> t h w c").to(torch.uint8).numpy())
    return max(tried, key=lambda restored: psnr(frames, restored).mean())


def block_dct(frames: np.ndarray, rate: LatentRate | None = None) -> np.ndarray:
    """Keeps the lowest frequencies of a 3-D cosine transform in blocks as large as a latent pixel's.

    Each t x s x s block keeps as many coefficients as the latent has channels, over luma and both chroma planes
    together: of 16, luma keeps 12 and each chroma plane 2, lowest squared frequency first. The first frame is
    transformed alone in 1 x s x s blocks with the same budget, as the causal tokenizer spends on it.

    Args:
        frames: uint8 [T, H, W, 3].
        rate: The tokenizer's; 8x8x8 with 16 channels by default.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        UserError: The video's size is none that the tokenizer takes.
    """
    import cv2

    rate = rate or LatentRate()
    rate.num_stored(*frames.shape[:3])
    planes = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb) for frame in frames]).astype(np.float32)
    chroma = rate.channels // 8
    for plane, kept in enumerate((rate.channels - 2 * chroma, chroma, chroma)):
        planes[:1, ..., plane] = _lowest_frequencies(planes[:1, ..., plane], (1, rate.spatial, rate.spatial), kept)
        if len(frames) > 1:
            block = (rate.temporal, rate.spatial, rate.spatial)
            planes[1:, ..., plane] = _lowest_frequencies(planes[1:, ..., plane], block, kept)
    pictures = planes.round().clip(0, 255).astype(np.uint8)
    return np.stack([cv2.cvtColor(picture, cv2.COLOR_YCrCb2RGB) for picture in pictures])


def _lowest_frequencies(video: np.ndarray, block: tuple[int, int, int], kept: int) -> np.ndarray:
    """Zeroes all but the `kept` lowest coefficients of each block of float [T, H, W]."""
    from scipy.fft import dctn, idctn

    t, h, w = block
    sizes = {"t": t, "h": h, "w": w}
    blocks = rearrange(video, "(nt t) (nh h) (nw w) -> nt nh nw t h w", **sizes)
    frequency = sum(axis.astype(float) ** 2 for axis in np.ogrid[:t, :h, :w])
    order = np.argsort(frequency, axis=None, kind="stable")
    mask = np.zeros(t * h * w, bool)
    mask[order[:kept]] = True
    coefficients = dctn(blocks, axes=(3, 4, 5), norm="ortho") * mask.reshape(block)
    restored = idctn(coefficients, axes=(3, 4, 5), norm="ortho")
    return rearrange(restored, "nt nh nw t h w -> (nt t) (nh h) (nw w)")


def _cubic(video: torch.Tensor, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Resizes float [C, T, H, W] in space, then in time."""
    in_space = F.interpolate(video, size=(height, width), mode="bicubic", antialias=True)
    as_rows = rearrange(in_space, "c t h w -> c 1 t (h w)")
    in_time = F.interpolate(as_rows, size=(num_frames, height * width), mode="bicubic", antialias=True)
    return rearrange(in_time, "c 1 t (h w) -> c t h w", h=height)
