"""Building blocks of the image tokenizers.

They differ from those of the videos in more than the missing time: full 3x3 convolutions in place of factorised ones,
group norm with many groups, and resampling without a pooled shortcut.

Shape letters: B batch, C channels, H height, W width, S = H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemo_cosmos.tokenizer.config import IMAGE_NORM_GROUPS
from nemo_cosmos.tokenizer.layers import NORM_EPS


def image_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def image_norm(channels: int) -> nn.GroupNorm:
    """Returns the group norm of the image networks; the groups divide the channels."""
    return nn.GroupNorm(IMAGE_NORM_GROUPS, channels, eps=NORM_EPS)


class ImageResnetBlock(nn.Module):
    """Twice norm, SiLU, convolution, around a shortcut.

    Args:
        in_channels: Channels in.
        out_channels: Channels out; a pointwise shortcut is added where they differ.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = image_norm(in_channels)
        self.conv1 = image_conv(in_channels, out_channels)
        self.norm2 = image_norm(out_channels)
        self.conv2 = image_conv(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class ImageAttention(nn.Module):
    """Single-head self-attention of all pixels, with a residual.

    Args:
        channels: Channels in and out; the scale is channels^-0.5.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = image_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        h_BCHW = self.norm(x_BCHW)
        qkv = (rearrange(conv(h_BCHW), "B C H W -> B 1 (H W) C") for conv in (self.q, self.k, self.v))
        out_B1SC = F.scaled_dot_product_attention(*qkv)
        return x_BCHW + self.proj_out(rearrange(out_B1SC, "B 1 (H W) C -> B C H W", H=x_BCHW.shape[2]))


class ImageMiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest level.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ImageResnetBlock(channels, channels)
        self.attn_1 = ImageAttention(channels)
        self.block_2 = ImageResnetBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class ImageDownsample(nn.Module):
    """Halves height and width by a strided convolution, which sees zeros to the right and below.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.conv(self.pad(x_BCHW))


class ImageUpsample(nn.Module):
    """Doubles height and width by repetition, then mixes neighbours.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = image_conv(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))
