"""Folding a video or an image into patches of wavelet coefficients and back.

The reference cascades 2x2x2 (image: 2x2) Haar steps with strided convolutions, each step over all bands of the one
before. The steps are linear and see disjoint p x p x p blocks, so the whole cascade is one p^3 x p^3 matrix of signs
per colour channel. One layout change and one matrix product do it, at a fraction of the reference's memory traffic.

Shape letters: B batch, C colours, T H W samples, G a grid of them, P all samples of a patch, K all its coefficients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from nemo_cosmos.tokenizer import fast_conv, pages
from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past
from nemo_cosmos.tokenizer.config import PatchMethod

_HAAR_STEP = ((1.0, 1.0), (1.0, -1.0))
_BAND_AXES = {3: (0, 1, 2), 2: (1, 0)}
"""Number of axes -> the axes by which the reference orders bands, slowest first: (t, h, w), but for images (w, h)."""


def haar_signs(patch_size: int, num_axes: int = 3) -> Tensor:
    """Returns the cascaded Haar transform of one patch, without its scale.

    Args:
        patch_size: Edge of the patch in samples, a power of two.
        num_axes: 3 for a video's patch, 2 for an image's.

    Returns:
        Float64 [K, P] of +1 and -1. Row: band of the last step (slowest), ..., band of the first step, each band in
        the order lll, llh, lhl, lhh, hll, hlh, hhl, hhh over (t, h, w), of an image ll, lh, hl, hh over (w, h). Column:
        sample (t, h, w) or (h, w), w fastest. Rows are orthogonal, so the inverse is the transpose over
        patch_size^num_axes.
    """
    num_steps = int(math.log2(patch_size))
    order = _BAND_AXES[num_axes]
    step = torch.tensor(_HAAR_STEP, dtype=torch.float64)
    signs_KP = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(num_axes * num_steps):
        signs_KP = torch.kron(signs_KP, step)
    # Step 1 pairs neighbours: its bit is the lowest of a sample's coordinate. Bits of a row stand step by step,
    # bits of a column axis by axis; both from the last step (coarse) to the first (fine).
    bits = signs_KP.reshape(-1, *[2] * (num_axes * num_steps))
    axis_major = [1 + step_i * num_axes + order.index(axis) for axis in range(num_axes) for step_i in range(num_steps)]
    return bits.permute(0, *axis_major).reshape(signs_KP.shape).contiguous()


def _analysis_matrix(patch_size: int, method: PatchMethod, num_axes: int) -> Tensor:
    """Float32 [K, P]; every entry is a signed power of two, so its products are exact in every float format."""
    if method == "haar":
        return (haar_signs(patch_size, num_axes) / patch_size**num_axes).float()
    return torch.eye(patch_size**num_axes)


def _synthesis_matrix(patch_size: int, method: PatchMethod, num_axes: int) -> Tensor:
    """Float32 [P, K], the inverse."""
    matrix_PK = _analysis_matrix(patch_size, method, num_axes).T.contiguous()
    return matrix_PK * patch_size**num_axes if method == "haar" else matrix_PK


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """Applies `matrix` to the last axis in the matrix's own precision: autocast would round pixels to bf16."""
    with torch.autocast(x.device.type, enabled=False):
        # Contiguous, because a strided last axis would turn the one product into a slow batched one.
        return F.linear(x.type_as(matrix).contiguous(), matrix)


def _fold(x_BGCP: Tensor, matrix_KP: Tensor, method: PatchMethod) -> Tensor:
    """[B, grid, C, P] -> [B, channels, grid] for a grid of any number of axes."""
    if method == "rearrange":
        return rearrange(x_BGCP, "B ... C P -> B (C P) ...")
    x_BGK = rearrange(_mix(x_BGCP, matrix_KP), "B ... C K -> B ... (K C)")
    return rearrange(x_BGK, "B ... K -> B K ...")  # a view, so the memory stays channels-last


def _unfold(x_BCG: Tensor, matrix_PK: Tensor, method: PatchMethod) -> Tensor:
    """[B, channels, grid] -> [B, grid, C, P]."""
    if method == "rearrange":
        return rearrange(x_BCG, "B (C P) ... -> B ... C P", P=len(matrix_PK))
    return _mix(rearrange(x_BCG, "B (K C) ... -> B ... C K", K=len(matrix_PK)), matrix_PK)


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
        self.register_buffer("matrix_KP", _analysis_matrix(patch_size, method, 3), persistent=False)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """Folds a video.

        Args:
            x_BCTHW: [B, C, 1 + k p, H, W] with H and W divisible by p; a later chunk has k p frames.
            past: Tells which frames of the video they are.

        Returns:
            [B, K C, 1 + k, H / p, W / p], of a later chunk k frames, in channels-last memory; `haar` has the bands
            slow and the colours fast, `rearrange` the other way round.
        """
        p = self.patch_size
        if fast_conv.applies(x_BCTHW):
            return self._patch_by_patch(x_BCTHW, past)
        if past.at_start:
            first = repeat(x_BCTHW[:, :, :1], "B C 1 H W -> B C p H W", p=p)
            x_BCTHW = torch.cat([first, x_BCTHW[:, :, 1:]], dim=2)
        return self._fold(x_BCTHW)

    def _fold(self, x_BCTHW: Tensor) -> Tensor:
        pattern, p = "B C (T pt) (H ph) (W pw) -> B T H W C (pt ph pw)", self.patch_size
        return _fold(rearrange(x_BCTHW, pattern, pt=p, ph=p, pw=p), self.matrix_KP, self.method)

    def _patch_by_patch(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        """As `forward`, without copies of the whole video on the way."""
        p, num_single = self.patch_size, 1 if past.at_start else 0
        first = [x_BCTHW[:, :, :1].expand(-1, -1, p, -1, -1)] * num_single
        batch_size, channels, num_frames, height, width = x_BCTHW.shape
        patches = [*first, *(x_BCTHW[:, :, start : start + p] for start in range(num_single, num_frames, p))]
        shape = (batch_size, len(patches), height // p, width // p, channels * p**3)
        y_BCTHW = pages.empty(self.matrix_KP, *shape).permute(0, 4, 1, 2, 3)
        for t, patch in enumerate(patches):
            y_BCTHW[:, :, t : t + 1] = self._fold(patch)
        return y_BCTHW


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
        self.register_buffer("matrix_PK", _synthesis_matrix(patch_size, method, 3), persistent=False)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """Unfolds coefficients.

        Args:
            x_BCTHW: [B, K C, 1 + k, H, W] as `Patcher` gives it.
            past: Tells which frames of the video they are.

        Returns:
            [B, C, 1 + k p, H p, W p]; of a later chunk p frames for each.
        """
        p = self.patch_size
        x_BTHWCP = _unfold(x_BCTHW, self.matrix_PK, self.method)
        pattern = "B T H W C (pt ph pw) -> B C (T pt) (H ph) (W pw)"
        x_BCTHW = rearrange(x_BTHWCP, pattern, pt=p, ph=p, pw=p)
        return x_BCTHW[:, :, p - 1 :] if past.at_start else x_BCTHW


class ImagePatcher(nn.Module):
    """Image -> coefficients.

    Per step the reference's orthonormal Haar (taps 1/sqrt 2 on two axes) is divided by 2, which makes the low band the
    mean of its samples.

    Args:
        patch_size: Edge of the patch in pixels, a power of two.
        method: As in `Patcher`.
    """

    def __init__(self, patch_size: int, method: PatchMethod) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.method = method
        self.register_buffer("matrix_KP", _analysis_matrix(patch_size, method, 2), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K C, H / p, W / p] in channels-last memory; bands and colours stand as in `Patcher`."""
        p = self.patch_size
        x_BHWCP = rearrange(x_BCHW, "B C (H ph) (W pw) -> B H W C (ph pw)", ph=p, pw=p)
        return _fold(x_BHWCP, self.matrix_KP, self.method)


class ImageUnpatcher(nn.Module):
    """Coefficients -> image: the inverse of `ImagePatcher`.

    Args:
        patch_size: Edge of the patch in pixels, a power of two.
        method: As in `Patcher`.
    """

    def __init__(self, patch_size: int, method: PatchMethod) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.method = method
        self.register_buffer("matrix_PK", _synthesis_matrix(patch_size, method, 2), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, K C, H, W] -> [B, C, H p, W p]."""
        p = self.patch_size
        x_BHWCP = _unfold(x_BCHW, self.matrix_PK, self.method)
        return rearrange(x_BHWCP, "B H W C (ph pw) -> B C (H ph) (W pw)", ph=p, pw=p)
