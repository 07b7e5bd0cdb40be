"""First weights from which a tokenizer learns quickly: those of a plain transform codec.

From random weights a tokenizer spends most of its training on finding out that a few coarse bands hold nearly all of a
picture. Here it starts there: the first convolution picks the coarsest wavelet bands of brightness and of colour
contrasts and brings them to about equal strength; the skips carry them unchanged to the latent and back; the last
convolution puts them where they came from. Every residual branch starts silent.

The signals travel in pairs (x, -x): since silu(x) - silu(-x) = x, they pass the nonlinearities before the encoder's and
the decoder's last convolution unharmed.

Shape letters: S signals, K channels of the patched video.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.layers import CausalAttention, CausalConv3d, HybridDownsample, HybridUpsample, ResnetBlock
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.tokenizer.patching import haar_signs

_NOISE = 0.1
"""Share of torch's own first weights that is kept beside the signals' path, so that no two channels are equal."""
_COLOUR_COST = 3.0
"""How much weaker than brightness a colour contrast is taken to be."""
_MOST_GAIN = 8.0
"""Finer bands than those of this cost are not brought to full strength, for the noise in them would be too."""
_BRIGHTNESS = 0.3
"""Spread of a patch's brightness, in units of [-1, 1]; the norms inside bring the signals to a spread of 1."""


@torch.no_grad()
def initialize(tokenizer: CausalVideoTokenizer) -> None:
    """Sets all convolutions of a freshly built tokenizer; norms keep their start (scale 1, shift 0).

    Draws from torch's global random state, as torch's own initialisation does.
    """
    silent, inner = _residual_ends(tokenizer), _inside_branches(tokenizer)
    for conv in (module for module in tokenizer.modules() if isinstance(module, CausalConv3d)):
        nn.init.zeros_(conv.conv3d.bias)
        if conv in silent:
            nn.init.zeros_(conv.conv3d.weight)
        elif conv not in inner:
            _carry(conv, torch.eye(conv.conv3d.out_channels, conv.conv3d.in_channels))
    config, encoder, decoder = tokenizer.tokenizer_config, tokenizer.encoder, tokenizer.decoder
    num_signals = config.channels * min(1, *config.channels_mult, *config.decoder_factors) // 2
    analysis_SK, synthesis_KS = coarsest_bands(config, num_signals)
    latent_SL = torch.eye(num_signals, config.num_z_channels)
    _carry(encoder.conv_in[0], _in_pairs(analysis_SK.T, encoder.conv_in[0].conv3d.out_channels).T)
    _carry(encoder.conv_out[0], _in_pairs(latent_SL.T, encoder.conv_out[0].conv3d.in_channels))
    _carry(decoder.conv_in[0], _in_pairs(latent_SL.T, decoder.conv_in[0].conv3d.out_channels).T)
    # A pixel is a sum over all bands, so noise in each of them would drown it.
    _carry(decoder.conv_out[0], _in_pairs(synthesis_KS, decoder.conv_out[0].conv3d.in_channels), noise=0.0)
    _carry(decoder.conv_out[1], torch.eye(config.patch_channels), noise=0.0)


def coarsest_bands(config: TokenizerConfig, num_signals: int) -> tuple[Tensor, Tensor]:
    """Chooses the strongest signals of a patch, by the rule that strength falls with frequency.

    Args:
        config: The architecture; its patch is transformed.
        num_signals: S; more than the patch holds leaves the last ones zero.

    Returns:
        What takes the signals out of a patched video, [S, K], at about equal strength, and what puts them back,
        [K, S]. Each column of the second has one band and one direction in colour space.
    """
    signs = haar_signs(config.patch_size).float()
    cost_P = _band_costs(signs, config.patch_size)
    axes = _colour_axes(config.in_channels)
    colour_cost = torch.full((config.in_channels,), _COLOUR_COST)
    colour_cost[0] = 1.0
    cost = torch.outer(cost_P, colour_cost).flatten()
    chosen = cost.argsort(stable=True)[:num_signals]
    bands, colours = chosen // config.in_channels, chosen % config.in_channels
    gain_S = cost[chosen].clamp(max=_MOST_GAIN) / _BRIGHTNESS
    is_haar = config.patch_method == "haar"
    into = torch.eye(len(signs))[bands] if is_haar else signs[bands] / len(signs)
    back = torch.eye(len(signs))[bands] if is_haar else signs[bands]
    # Patched channels have the bands slow and the colours fast.
    analysis, synthesis = torch.zeros(2, num_signals, config.patch_channels)
    analysis[: len(chosen)] = torch.einsum("sp,sc->spc", into, axes[colours]).flatten(1) * gain_S[:, None]
    synthesis[: len(chosen)] = torch.einsum("sp,sc->spc", back, axes[colours]).flatten(1) / gain_S[:, None]
    return analysis, synthesis.T


def _band_costs(signs_KP: Tensor, patch_size: int) -> Tensor:
    """The product over time, height and width of 1 + the number of sign changes along it."""
    blocks = signs_KP.reshape(-1, patch_size, patch_size, patch_size)
    changes = [(blocks.diff(dim=dim) != 0).flatten(1).sum(1) / patch_size**2 for dim in (1, 2, 3)]
    return torch.stack([1 + along for along in changes]).prod(0)


def _colour_axes(num_colours: int) -> Tensor:
    """Orthonormal rows: the grey axis, then contrasts between colours."""
    start = torch.eye(num_colours)
    start[:, 0] = 1.0
    return torch.linalg.qr(start)[0].T


def _in_pairs(matrix_NS: Tensor, num_channels: int) -> Tensor:
    """[N, S] for signals -> [N, num_channels] for channels that hold them as x_0 ... x_S, -x_0 ... -x_S, others."""
    paired = torch.cat([matrix_NS, -matrix_NS], dim=1)
    return torch.nn.functional.pad(paired, (0, num_channels - paired.shape[1]))


def _carry(conv: CausalConv3d, matrix: Tensor, *, noise: float = _NOISE) -> None:
    """Sets a convolution to `matrix` [C', C] at the same pixel of the current frame, and noise elsewhere."""
    weight = conv.conv3d.weight
    nn.init.kaiming_uniform_(weight, a=5**0.5).mul_(noise)
    weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2] += matrix.to(weight)


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


def _inside_branches(tokenizer: CausalVideoTokenizer) -> set[nn.Module]:
    """What leads to those ends; torch's own first weights suit it."""
    inside: set[nn.Module] = set()
    for module in tokenizer.modules():
        if isinstance(module, ResnetBlock):
            inside |= {*module.conv1, *module.conv2}
        elif isinstance(module, CausalAttention):
            inside |= {module.q, module.k, module.v}
    return inside
