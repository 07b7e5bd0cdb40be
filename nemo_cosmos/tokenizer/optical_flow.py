"""How pixels move from one frame to the next: RAFT where torchvision has its weights, else a classical estimate.

Shape letters: N frame pairs, C colours, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from nemo.utils import logging
from torch import Tensor, nn

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.public_weights import public_weights

RAFT_URL = "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth"
"""The weights that the published training uses: torchvision's default for `raft_large`."""

_GREY = (0.299, 0.587, 0.114)


class LucasKanadeFlow:
    """Least squares on windows of the brightness equation, from coarse to fine; no weights.

    Every operation is differentiable, so a loss on the flow reaches the frames. It sees motion of a few pixels per
    frame on textured surfaces; where there is no texture it says that nothing moves.

    Source: Lucas and Kanade 1981; Bouguet 2001 for the pyramid.

    Args:
        num_levels: Levels of the pyramid, each half the size of the one before; fewer where the frames are small.
        num_iterations: Refinements per level.
        window: Edge in pixels of the window, odd.
        damping: Added to the squared gradients, whose unit is (brightness in [-1, 1] per pixel)^2.
    """

    name = "Lucas-Kanade flow"
    _SMALLEST = 16

    def __init__(self, *, num_levels: int = 3, num_iterations: int = 3, window: int = 9, damping: float = 1e-3) -> None:
        self._num_levels, self._num_iterations = num_levels, num_iterations
        self._window, self._damping = window, damping

    def __call__(self, first_NCHW: Tensor, second_NCHW: Tensor) -> Tensor:
        """Motion in pixels that takes the first frames to the second, [N, 2, H, W], x before y."""
        pyramid = [(_grey(first_NCHW.float()), _grey(second_NCHW.float()))]
        while len(pyramid) < self._num_levels and min(pyramid[-1][0].shape[2:]) >= 2 * self._SMALLEST:
            pyramid.append(tuple(F.avg_pool2d(frame, 2) for frame in pyramid[-1]))
        flow_NCHW = torch.zeros_like(pyramid[-1][0]).repeat(1, 2, 1, 1)
        for first, second in reversed(pyramid):
            if flow_NCHW.shape[2:] != first.shape[2:]:
                flow_NCHW = 2 * F.interpolate(flow_NCHW, first.shape[2:], mode="bilinear", align_corners=False)
            flow_NCHW = self._refined(first, second, flow_NCHW)
        return flow_NCHW

    def _refined(self, first: Tensor, second: Tensor, flow_NCHW: Tensor) -> Tensor:
        along_x, along_y = _gradients(first)
        xx, yy, xy = (self._mean(a) for a in (along_x**2, along_y**2, along_x * along_y))
        xx, yy = xx + self._damping, yy + self._damping
        determinant = xx * yy - xy**2
        for _ in range(self._num_iterations):
            missing = first - warp(second, flow_NCHW)
            x, y = self._mean(along_x * missing), self._mean(along_y * missing)
            step = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant
            # A window that hardly sees texture may ask for a leap; one level corrects by about a pixel. Smoothed, since
            # a window's pixels were moved each by its own flow, and iterations without it drift apart.
            flow_NCHW = self._mean(flow_NCHW + step.clamp(-1, 1))
        return flow_NCHW

    def _mean(self, x_NCHW: Tensor) -> Tensor:
        padded = F.pad(x_NCHW, [self._window // 2] * 4, mode="replicate")
        return F.avg_pool2d(padded, self._window, stride=1)


class RaftFlow:
    """RAFT with torchvision's weights; needs torchvision.

    Raises:
        UserError: torchvision cannot be imported, or the weights cannot be had.

    Source: Teed and Deng 2020, arXiv 2003.12039.
    """

    name = "RAFT (torchvision, C_T_SKHT_V2)"

    def __init__(self) -> None:
        try:
            from torchvision.models.optical_flow import raft_large
        except (ImportError, RuntimeError) as error:  # the latter where it belongs to another torch
            raise UserError(
                f"RAFT: torchvision cannot be imported ({error}). Install the one for this torch."
            ) from error
        weights = torch.load(public_weights(RAFT_URL), map_location="cpu", weights_only=True)
        network: nn.Module = raft_large(weights=None)
        network.load_state_dict(weights)
        self._network = network.requires_grad_(False).eval()

    def __call__(self, first_NCHW: Tensor, second_NCHW: Tensor) -> Tensor:
        """Motion in pixels that takes the first frames to the second, [N, 2, H, W].

        Raises:
            UserError: H or W is below 128 or no multiple of 8.
        """
        height, width = first_NCHW.shape[2:]
        if min(height, width) < 128 or height % 8 or width % 8:
            raise user_error(
                "frames that RAFT compares",
                (height, width),
                "multiples of 8, at least 128",
                "Take larger crops or a smaller flow_scale, or model.flow.method=lucas_kanade.",
            )
        return self._network.to(first_NCHW.device)(first_NCHW, second_NCHW)[-1]


def optical_flow(method: Literal["auto", "raft", "lucas_kanade"] = "auto") -> LucasKanadeFlow | RaftFlow:
    """The estimator of a method.

    Args:
        method: `auto` takes RAFT, and Lucas-Kanade with a warning where RAFT cannot be had.

    Raises:
        UserError: There is no such method, or RAFT was asked for and cannot be had.
    """
    if method not in ("auto", "raft", "lucas_kanade"):
        raise user_error("optical flow", method, "'auto', 'raft' or 'lucas_kanade'", "Choose one of these.")
    if method == "lucas_kanade":
        return LucasKanadeFlow()
    try:
        return RaftFlow()
    except UserError as error:
        if method == "raft":
            raise
        logging.warning(f"Lucas-Kanade flow stands in for RAFT. {error}")
        return LucasKanadeFlow()


def warp(frames_NCHW: Tensor, flow_NCHW: Tensor) -> Tensor:
    """Looks each pixel up where the flow says that it went, bilinearly; beyond the border the border's pixel counts."""
    _, _, height, width = frames_NCHW.shape
    y_HW, x_HW = torch.meshgrid(
        torch.arange(height, device=frames_NCHW.device), torch.arange(width, device=frames_NCHW.device), indexing="ij"
    )
    x_NHW, y_NHW = x_HW + flow_NCHW[:, 0], y_HW + flow_NCHW[:, 1]
    # Pixel centres of the first and the last pixel lie at -1 and 1.
    grid_NHW2 = torch.stack([2 * x_NHW / max(width - 1, 1) - 1, 2 * y_NHW / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(frames_NCHW, grid_NHW2, mode="bilinear", padding_mode="border", align_corners=True)


def _grey(frames_NCHW: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, device=frames_NCHW.device).view(1, 3, 1, 1)
    return (frames_NCHW * weights).sum(1, keepdim=True)


def _gradients(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y; at the border half a one-sided one."""
    padded = F.pad(x_NCHW, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    along_y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return along_x, along_y
