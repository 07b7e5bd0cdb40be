"""The network that tells reconstructions from videos in the adversarial stage. No public code has one; it is ours.

- It sees pixels and no features of a pretrained network: those that can be had differ from place to place, and what
  they are blind to a tokenizer could get wrong unpunished.
- It judges patches in space and time (Isola et al. 2017, arXiv 1611.07004), so any size will do, and texture and
  flicker count rather than what the video shows.
- It looks back and ahead alike: it need not be causal, for it is never run on a stream. In time the border frame is
  repeated, so a picture is a video that stands still and the same weights judge both.
- Spectral norm keeps it smooth (Miyato et al. 2018, arXiv 1802.05957) at the price of two matrix-vector products per
  layer. A gradient penalty would take a second backward pass through it in every step.

Shape letters: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_cosmos.errors import user_error

_LEAK = 0.2
_POWER_ITERATIONS_AT_START = 20


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes. With three levels a logit sees 54x54 pixels of 25 frames."""

    in_channels: int = 3
    """Colour channels of the video."""
    channels: int = 64
    """Width of the first level; each level doubles it, up to eight times."""
    num_levels: int = 3
    """Levels, each of which halves height and width; all but the first halve time, too."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A field is not positive.
        """
        for name in ("in_channels", "channels", "num_levels"):
            if getattr(self, name) < 1:
                raise user_error(name, getattr(self, name), "a positive integer", "Correct the discriminator config.")


class SpectralConv3d(nn.Conv3d):
    """Convolution whose weight is divided by its largest singular value; in time the border frame is repeated.

    The singular vectors are buffers that only `iterate_power` moves. So a forward pass changes nothing, and the result
    does not depend on how a batch is divided into micro-batches and ranks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int], stride: tuple[int, int, int]
    ) -> None:
        space_padding = (0, (kernel_size[1] - 1) // 2, (kernel_size[2] - 1) // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=space_padding)
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("right", torch.empty(self.weight[0].numel()))
        for _ in range(_POWER_ITERATIONS_AT_START):
            self.iterate_power()

    @torch.no_grad()
    def iterate_power(self) -> None:
        """One step of the power iteration."""
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(matrix.T @ self.left, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T', H', W']."""
        # By sums, which autocast leaves in float32.
        sigma = ((self.weight.flatten(1) * self.right).sum(1) * self.left).sum()
        reach = self.kernel_size[0] // 2
        padded_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, reach, reach), mode="replicate")
        return self._conv_forward(padded_BCTHW, self.weight / sigma, self.bias)


class PatchDiscriminator3d(nn.Module):
    """Logits of patches: high for videos, low for reconstructions.

    Args:
        config: Sizes.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.in_channels, *(config.channels * min(2**level, 8) for level in range(config.num_levels))]
        self.levels = nn.ModuleList(
            SpectralConv3d(widths[level], widths[level + 1], (3, 4, 4), stride=(2 if level else 1, 2, 2))
            for level in range(config.num_levels)
        )
        self.conv = SpectralConv3d(widths[-1], widths[-1], (3, 3, 3), stride=(1, 1, 1))
        self.head = SpectralConv3d(widths[-1], 1, (3, 3, 3), stride=(1, 1, 1))

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Judges videos.

        Args:
            video_BCTHW: Float [B, C, T, H, W] in [-1, 1], T at least 1, H and W at least 2^num_levels.

        Returns:
            Logits [B, 1, T', H', W'].
        """
        x_BCTHW = video_BCTHW
        for convolution in (*self.levels, self.conv):
            x_BCTHW = F.leaky_relu(convolution(x_BCTHW), _LEAK)
        return self.head(x_BCTHW)

    def iterate_power(self) -> None:
        """Brings the spectral norms after the weights, by one step of the power iteration."""
        for convolution in (*self.levels, self.conv, self.head):
            convolution.iterate_power()
