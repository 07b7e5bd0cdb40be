"""The decoder: latent after the pointwise convolution -> video."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.layers import CausalNorm, FactorisedConv, HybridUpsample, MiddleBlock, ResnetBlock, silu
from nemo_cosmos.tokenizer.patching import Unpatcher


class UpLevel(nn.Module):
    """Residual blocks of one level, then the way up, if there is one.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_blocks: Number of residual blocks.
        space: Whether the level doubles height and width.
        time: Whether the level doubles time.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, space: bool, time: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.upsample = HybridUpsample(out_channels, space=space, time=time) if space or time else None

    def __iter__(self) -> Iterator[nn.Module]:
        """Yields the layers, for the caller to run: while a call lasts, its argument stays in memory."""
        yield from self.block
        if self.upsample is not None:
            yield self.upsample


def up_axes(config: TokenizerConfig) -> list[tuple[bool, bool]]:
    """Returns for each decoder level, coarse to fine, whether it doubles (space, time).

    Not the encoder's rule mirrored: time starts one level later, and space goes with time, or in the first levels
    where space is compressed more than time. The finest level never doubles.

    Source: released CausalVideoTokenizer with `legacy_mode` off.
    """
    num_space, num_time = config.num_spatial_levels, config.num_temporal_levels
    axes = []
    for step in range(config.num_decoder_levels - 1):
        time = 0 < step < num_time + 1
        axes.append((time or (step < num_space and num_space > num_time), time))
    return [*axes, (False, False)]


class Decoder(nn.Module):
    """Takes a latent up to the patched grid and unfolds it.

    Args:
        config: The tokenizer's architecture.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        # Coarse to fine; the coarsest level keeps the width of the middle block.
        factors = config.decoder_factors
        widths = [config.channels * factor for factor in (factors[-1], *reversed(factors))]
        self.conv_in = FactorisedConv(config.num_z_channels, widths[0])
        self.mid = MiddleBlock(widths[0])
        levels = [
            UpLevel(width_in, width_out, config.num_res_blocks + 1, space=space, time=time)
            for width_in, width_out, (space, time) in zip(widths, widths[1:], up_axes(config), strict=False)
        ]
        # Numbered from fine to coarse like the encoder's, and run from the last to the first.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = CausalNorm(widths[-1])
        self.conv_out = FactorisedConv(widths[-1], config.patch_channels)
        self.unpatcher3d = Unpatcher(config.patch_size, config.patch_method)

    def forward(self, z_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, z_channels, T', H', W'] -> [B, 3, T, H, W]; with a past the next frames of its video."""
        h_BCTHW = self.mid(self.conv_in(z_BCTHW, past), past)
        for layer in itertools.chain(*reversed(self.up)):
            h_BCTHW = layer(h_BCTHW, past)
        video_BCTHW = self.unpatcher3d(self.conv_out(silu(self.norm_out(h_BCTHW)), past), past)
        past.end_chunk()
        return video_BCTHW
