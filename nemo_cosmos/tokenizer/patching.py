"""Folding a video into patches of wavelet coefficients and back.

The reference cascades 2x2x2 Haar steps with strided convolutions, each step over all bands of the one before. The
steps are linear and see disjoint p x p x p blocks, so the whole cascade is one p^3 x p^3 matrix of signs per colour
channel. One layout change and one matrix product do it, at a fraction of the reference's memory traffic.

Shape letters: B batch, C colours, T H W samples, P all samples of a patch, K all its coefficients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from nemo_cosmos.tokenizer.causal_cache import CausalCache, starts_video
from nemo_cosmos.tokenizer.config import PatchMethod

_HAAR_STEP = ((1.0, 1.0), (1.0, -1.0))


def haar_signs(patch_size: int) -> Tensor:
    """Returns the cascaded Haar transform of one patch, without its scale.

    Args:
        patch_size: Edge of the patch in samples, a power of two.

    Returns:
        Float64 [K, P] of +1 and -1. Row: band of the last step (slowest), ..., band of the first step, each band in
        the order lll, llh, lhl, lhh, hll, hlh, hhl, hhh over (t, h, w). Column: sample (t, h, w), w fastest. Rows are
        orthogonal, so the inverse is the transpose over patch_size^3.
    """
    num_steps = int(math.log2(patch_size))
    step = torch.tensor(_HAAR_STEP, dtype=torch.float64)
    signs_KP = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3 * num_steps):
        signs_KP = torch.kron(signs_KP, step)
    # Step 1 pairs neighbours: its bit is the lowest of a sample's coordinate. Bits of a row stand step by step,
    # bits of a column axis by axis; both from the last step (coarse) to the first (fine).
    bits = signs_KP.reshape(-1, *[2] * (3 * num_steps))
    axis_major = [1 + step_i * 3 + axis for axis in range(3) for step_i in range(num_steps)]
    return bits.permute(0, *axis_major).reshape(signs_KP.shape).contiguous()


def _patch_matrix(patch_size: int, method: PatchMethod) -> Tensor:
    """Float32 [K, P]; every entry is a signed power of two, so its products are exact in every float format."""
    if method == "haar":
        return (haar_signs(patch_size) / patch_size**3).float()
    return torch.eye(patch_size**3)


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """Applies `matrix` to the last axis in the matrix's own precision: autocast would round pixels to bf16."""
    with torch.autocast(x.device.type, enabled=False):
        # Contiguous, because a strided last axis would turn the one product into a slow batched one.
        return F.linear(x.to(matrix.dtype).contiguous(), matrix)


class Patcher(nn.Module):
    """Video -> coefficients, the first frame standing for a whole patch of equal frames.

    Per step the reference's orthonormal Haar (taps 1/sqrt 2 on three axes) is divided by 2 sqrt 2, which makes the
    low band the mean of its samples.

    Args:
        patch_size: Edge of the patch in samples, a power of two.
        method: `haar`, or `rearrange` for the samples themselves.
    """

    def __init__(self, patch_size: int, method: PatchMethod) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.method = method
        self.register_buffer("matrix_KP", _patch_matrix(patch_size, method), persistent=False)

    def forward(self, x_BCTHW: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Folds a video.

        Args:
            x_BCTHW: [B, C, 1 + k p, H, W] with H and W divisible by p; a later chunk has k p frames.
            cache: Tells which chunk of the video it is; None for the whole.

        Returns:
            [B, K C, 1 + k, H / p, W / p], of a later chunk k frames, in channels-last memory; `haar` has the bands
            slow and the colours fast, `rearrange` the other way round.
        """
        p = self.patch_size
        if starts_video(cache):
            first = repeat(x_BCTHW[:, :, :1], "B C 1 H W -> B C p H W", p=p)
            x_BCTHW = torch.cat([first, x_BCTHW[:, :, 1:]], dim=2)
        pattern = "B C (T pt) (H ph) (W pw) -> B T H W C (pt ph pw)"
        x_BTHWCP = rearrange(x_BCTHW, pattern, pt=p, ph=p, pw=p)
        if self.method == "rearrange":
            return rearrange(x_BTHWCP, "B T H W C P -> B (C P) T H W")
        x_BTHWCK = _mix(x_BTHWCP, self.matrix_KP)
        return rearrange(x_BTHWCK, "B T H W C K -> B T H W (K C)").permute(0, 4, 1, 2, 3)


class Unpatcher(nn.Module):
    """Coefficients -> video: the inverse of `Patcher`, of whose first patch only the last frame is kept.

    Args:
        patch_size: Edge of the patch in samples, a power of two.
        method: As in `Patcher`.
    """

    def __init__(self, patch_size: int, method: PatchMethod) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.method = method
        matrix_PK = _patch_matrix(patch_size, method).T.contiguous()
        self.register_buffer(
            "matrix_PK", matrix_PK * patch_size**3 if method == "haar" else matrix_PK, persistent=False
        )

    def forward(self, x_BCTHW: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Unfolds coefficients.

        Args:
            x_BCTHW: [B, K C, 1 + k, H, W] as `Patcher` gives it.
            cache: Tells which chunk of the video it is; None for the whole.

        Returns:
            [B, C, 1 + k p, H p, W p]; of a later chunk p frames for each.
        """
        p = self.patch_size
        if self.method == "rearrange":
            x_BTHWCP = rearrange(x_BCTHW, "B (C P) T H W -> B T H W C P", P=p**3)
        else:
            x_BTHWCK = rearrange(x_BCTHW, "B (K C) T H W -> B T H W C K", K=p**3)
            x_BTHWCP = _mix(x_BTHWCK, self.matrix_PK)
        pattern = "B T H W C (pt ph pw) -> B C (T pt) (H ph) (W pw)"
        x_BCTHW = rearrange(x_BTHWCP, pattern, pt=p, ph=p, pw=p)
        return x_BCTHW[:, :, p - 1 :] if starts_video(cache) else x_BCTHW
