"""First weights from which a tokenizer learns quickly.

Torch's own first weights shrink a signal to 1/sqrt(3) at every convolution, which leaves almost nothing of the video in
the latent, and thus almost no gradient in the encoder. Here every residual branch starts silent, and what carries the
signal between them starts as a rotation of its channels at the same pixel and frame.
"""

from __future__ import annotations

import torch
from torch import nn

from nemo_cosmos.tokenizer.layers import CausalAttention, CausalConv3d, HybridDownsample, HybridUpsample, ResnetBlock
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer

_NOISE = 0.2
"""Share of torch's own first weights that is kept around the rotation, so that no two taps are equal."""
_OUTPUT_SCALE = 0.02
"""Of the last convolution: a pixel is a sum of patch_size^3 of its outputs, which shall start near mid-grey."""


@torch.no_grad()
def initialize(tokenizer: CausalVideoTokenizer) -> None:
    """Sets all convolutions of a freshly built tokenizer; norms keep their start (scale 1, shift 0).

    Draws from torch's global random state, as torch's own initialisation does.
    """
    silent = _residual_ends(tokenizer)
    inner = {conv for block in tokenizer.modules() if isinstance(block, ResnetBlock) for conv in _branch(block)}
    inner |= {conv for block in tokenizer.modules() if isinstance(block, CausalAttention) for conv in _query(block)}
    for conv in (module for module in tokenizer.modules() if isinstance(module, CausalConv3d)):
        nn.init.zeros_(conv.conv3d.bias)
        if conv in silent:
            nn.init.zeros_(conv.conv3d.weight)
        elif conv not in inner:
            _rotate(conv.conv3d.weight)
    tokenizer.decoder.conv_out[-1].conv3d.weight.mul_(_OUTPUT_SCALE)


def _residual_ends(tokenizer: CausalVideoTokenizer) -> set[nn.Module]:
    """The last convolution of everything that has a skip around it."""
    ends: set[nn.Module] = set()
    for module in tokenizer.modules():
        if isinstance(module, ResnetBlock):
            ends.add(module.conv2[-1])
        elif isinstance(module, CausalAttention):
            ends.add(module.proj_out)
        elif isinstance(module, HybridDownsample | HybridUpsample):
            ends |= {conv for name, conv in module.named_children() if name in ("conv1", "conv2")}
    return ends


def _branch(block: ResnetBlock) -> tuple[nn.Module, ...]:
    return (*block.conv1, *block.conv2)


def _query(attention: CausalAttention) -> tuple[nn.Module, ...]:
    return (attention.q, attention.k, attention.v)


def _rotate(weight: torch.Tensor) -> None:
    """Weight [C', C, K_t, K_h, K_w]: (semi-)orthogonal at the current frame and pixel, small noise elsewhere."""
    out_channels, in_channels, _, height, width = weight.shape
    rotation = nn.init.orthogonal_(torch.empty(out_channels, in_channels, dtype=weight.dtype, device=weight.device))
    weight.mul_(_NOISE)
    weight[:, :, -1, height // 2, width // 2] += rotation
