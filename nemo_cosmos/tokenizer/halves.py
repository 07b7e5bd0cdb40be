"""A tokenizer cut as the published files cut it: encoder, decoder and the whole, each of tensors only.

Nothing here looks at values or refuses shapes, so that each part can be traced once and run at every size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.patching import ImagePatcher, ImageUnpatcher, Patcher, Unpatcher
from nemo_cosmos.tokenizer.quantizer import FSQuantizer
from nemo_cosmos.tokenizer.state_dict import reference_buffers


class EncoderHalf(nn.Module):
    """What `encoder.jit` holds.

    Args:
        tokenizer: Its layers are shared, not copied.

    Source: `encoder_jit` of NVIDIA cosmos-predict1 `tokenizer/networks`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantizer = tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer

    def forward(self, picture: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, Tensor, Tensor]:
        """Encodes a video [B, 3, T, H, W] or images [B, 3, H, W] in [-1, 1].

        Returns:
            (latent, (0, 0)), the zeros being the moments of a distribution that no released model has; of a discrete
            tokenizer (int32 indices, codes, loss of 0).
        """
        moments = self.quant_conv(self.encoder(picture))
        if self.quantizer is None:
            return moments, _no_moments(moments)
        indices, codes = self.quantizer(moments)
        return indices, codes, _no_loss(codes)


class DecoderHalf(nn.Module):
    """What `decoder.jit` holds.

    Args:
        tokenizer: Its layers are shared, not copied.

    Source: `decoder_jit` of NVIDIA cosmos-predict1 `tokenizer/networks`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.inv_quant = None if tokenizer.quantizer is None else _InverseQuantizer(tokenizer.quantizer)
        self.post_quant_conv, self.decoder = tokenizer.post_quant_conv, tokenizer.decoder

    def forward(self, latent: Tensor) -> Tensor:
        """Decodes what the encoder's first output is."""
        if self.inv_quant is not None:
            latent = self.inv_quant(latent).type_as(next(self.post_quant_conv.parameters()))
        return self.decoder(self.post_quant_conv(latent))


class Autoencoder(nn.Module):
    """What `autoencoder.jit` holds.

    Args:
        tokenizer: Its layers are shared, not copied.

    Source: `forward` of NVIDIA cosmos-predict1 `tokenizer/networks`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantizer = tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer
        self.post_quant_conv, self.decoder = tokenizer.post_quant_conv, tokenizer.decoder

    def forward(self, picture: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | Tensor, Tensor]:
        """Encodes and decodes.

        Returns:
            (reconstruction, (0, 0), latent), of a discrete tokenizer (reconstruction, loss of 0, int32 indices).
        """
        codes = self.quant_conv(self.encoder(picture))
        if self.quantizer is None:
            return self.decoder(self.post_quant_conv(codes)), _no_moments(codes), codes
        indices, codes = self.quantizer(codes)
        return self.decoder(self.post_quant_conv(codes)), _no_loss(codes), indices


def _no_moments(latent: Tensor) -> tuple[Tensor, Tensor]:
    return latent.new_zeros(1), latent.new_zeros(1)


def _no_loss(codes: Tensor) -> Tensor:
    """Zero for every sample, in the shape that the reference's mean over three axes leaves."""
    return torch.zeros_like(codes[:, :1, :1, :1])


class _InverseQuantizer(nn.Module):
    """Looks codes up; the module is there for its published name.

    Args:
        quantizer: Whose codes.
    """

    def __init__(self, quantizer: FSQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices: Tensor) -> Tensor:
        """Integers [B, ...] -> float32 [B, D, ...]."""
        return self.quantizer.indices_to_codes(indices)


def with_reference_buffers(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy whose state dict is the reference's, name by name, constants included.

    The reference's own code then loads a file of it, and `.to` of what was traced moves and casts all that takes part.
    """
    tokenizer = copy.deepcopy(tokenizer)
    for half in (tokenizer.encoder, tokenizer.decoder):
        for name, layer in half.named_children():
            if isinstance(layer, Patcher | Unpatcher | ImagePatcher | ImageUnpatcher):
                setattr(half, name, _ReferencePatching(layer))
    dtype = next(tokenizer.parameters()).dtype
    for name, constant in reference_buffers(tokenizer.tokenizer_config).items():
        parent, _, leaf = name.rpartition(".")
        stored = constant.to(dtype) if constant.is_floating_point() else constant
        tokenizer.get_submodule(parent).register_buffer(leaf, stored)
    return tokenizer


class _ReferencePatching(nn.Module):
    """A layer that folds or unfolds patches and has the reference's wavelet taps in place of its own matrix.

    The matrix, which no tap takes part in, is cast and moved with them.

    Args:
        layer: Whose one buffer is the matrix.
    """

    wavelets: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        ((self._name, self._matrix),) = layer.named_buffers()
        self._layer = (layer,)  # in a tuple, so that its buffer is not ours

    def forward(self, *args: Tensor | None) -> Tensor:
        """As the layer."""
        layer = self._layer[0]
        setattr(layer, self._name, self._matrix.type_as(self.wavelets))  # tracers refuse `functional_call`
        return layer(*args)
