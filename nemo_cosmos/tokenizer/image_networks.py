"""Encoder and decoder of the image tokenizers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.image_layers import (
    ImageDownsample,
    ImageMiddleBlock,
    ImageResnetBlock,
    ImageUpsample,
    image_conv,
    image_norm,
)
from nemo_cosmos.tokenizer.patching import ImagePatcher, ImageUnpatcher


def _blocks(in_channels: int, out_channels: int, num_blocks: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * num_blocks
    return nn.ModuleList(ImageResnetBlock(*pair) for pair in zip(widths, widths[1:], strict=False))


class ImageDownLevel(nn.Module):
    """Residual blocks of one level, then the way down, if there is one.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_blocks: Number of residual blocks.
        down: Whether the level halves height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, down: bool) -> None:
        super().__init__()
        self.block = _blocks(in_channels, out_channels, num_blocks)
        self.downsample = ImageDownsample(out_channels) if down else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class ImageUpLevel(nn.Module):
    """Residual blocks of one level, then the way up, if there is one.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_blocks: Number of residual blocks.
        up: Whether the level doubles height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, up: bool) -> None:
        super().__init__()
        self.block = _blocks(in_channels, out_channels, num_blocks)
        self.upsample = ImageUpsample(out_channels) if up else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


class ImageEncoder(nn.Module):
    """Patches an image and takes it down to the latent's grid; the finest levels halve it.

    Args:
        config: The tokenizer's architecture.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in (1, *config.channels_mult)]
        self.patcher = ImagePatcher(config.patch_size, config.patch_method)
        self.conv_in = image_conv(config.patch_channels, widths[0])
        self.down = nn.ModuleList(
            ImageDownLevel(
                widths[level], widths[level + 1], config.num_res_blocks, down=level < config.num_spatial_levels
            )
            for level in range(config.num_levels)
        )
        self.mid = ImageMiddleBlock(widths[-1])
        self.norm_out = image_norm(widths[-1])
        self.conv_out = image_conv(widths[-1], config.num_z_channels)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, z_channels, H', W']."""
        h_BCHW = self.conv_in(self.patcher(image_BCHW))
        for level in self.down:
            h_BCHW = level(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(h_BCHW))))


class ImageDecoder(nn.Module):
    """Takes a latent up to the patched grid and unfolds it.

    The coarsest levels double height and width, where in the encoder the finest ones halve them: with fewer steps than
    levels the two are no mirror images.

    Args:
        config: The tokenizer's architecture.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        # Coarse to fine; the coarsest level keeps the width of the middle block.
        factors = config.decoder_factors
        widths = [config.channels * factor for factor in (factors[-1], *reversed(factors))]
        self.conv_in = image_conv(config.num_z_channels, widths[0])
        self.mid = ImageMiddleBlock(widths[0])
        levels = [
            ImageUpLevel(widths[step], widths[step + 1], config.num_res_blocks + 1, up=step < config.num_spatial_levels)
            for step in range(config.num_decoder_levels)
        ]
        # Numbered from fine to coarse like the encoder's, and run from the last to the first.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = image_norm(widths[-1])
        self.conv_out = image_conv(widths[-1], config.patch_channels)
        self.unpatcher = ImageUnpatcher(config.patch_size, config.patch_method)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """[B, z_channels, H', W'] -> [B, 3, H, W]."""
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        return self.unpatcher(self.conv_out(F.silu(self.norm_out(h_BCHW))))
