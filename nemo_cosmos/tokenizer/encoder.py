"""The encoder: video -> latent before the pointwise quantizer convolution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.layers import CausalNorm, FactorisedConv, HybridDownsample, MiddleBlock, ResnetBlock, silu
from nemo_cosmos.tokenizer.patching import Patcher


class DownLevel(nn.Module):
    """Residual blocks of one level, then the way down, if there is one.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_blocks: Number of residual blocks.
        space: Whether the level halves height and width.
        time: Whether the level halves time.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, space: bool, time: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.downsample = HybridDownsample(out_channels, space=space, time=time) if space or time else None

    def __iter__(self) -> Iterator[nn.Module]:
        """Yields the layers, for the caller to run: while a call lasts, its argument stays in memory."""
        yield from self.block
        if self.downsample is not None:
            yield self.downsample


class Encoder(nn.Module):
    """Patches a video and takes it down to the latent's grid.

    Args:
        config: The tokenizer's architecture.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in (1, *config.channels_mult)]
        self.patcher3d = Patcher(config.patch_size, config.patch_method)
        self.conv_in = FactorisedConv(config.patch_channels, widths[0])
        self.down = nn.ModuleList(
            DownLevel(
                widths[level],
                widths[level + 1],
                config.num_res_blocks,
                space=level < config.num_spatial_levels,
                time=level < config.num_temporal_levels,
            )
            for level in range(config.num_levels)
        )
        self.mid = MiddleBlock(widths[-1])
        self.norm_out = CausalNorm(widths[-1])
        self.conv_out = FactorisedConv(widths[-1], config.num_z_channels)

    def forward(self, video_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, 3, T, H, W] -> [B, z_channels, T', H', W']; with a past the next frames of its video."""
        h_BCTHW = self.conv_in(self.patcher3d(video_BCTHW, past), past)
        for layer in itertools.chain(*self.down):
            h_BCTHW = layer(h_BCTHW, past)
        h_BCTHW = self.conv_out(silu(self.norm_out(self.mid(h_BCTHW, past))), past)
        past.end_chunk()
        return h_BCTHW
