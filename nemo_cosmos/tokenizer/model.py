"""The tokenizers: encoder, decoder, two pointwise convolutions around the latent, and a quantizer in discrete ones.

`build_tokenizer` makes the right one for a config: `CausalVideoTokenizer` or `ImageTokenizer`, each with a continuous
latent or with indices of a codebook.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past
from nemo_cosmos.tokenizer.config import Modality, TokenizerConfig
from nemo_cosmos.tokenizer.decoder import Decoder
from nemo_cosmos.tokenizer.encoder import Encoder
from nemo_cosmos.tokenizer.image_networks import ImageDecoder, ImageEncoder
from nemo_cosmos.tokenizer.layers import CausalConv3d
from nemo_cosmos.tokenizer.quantizer import FSQuantizer

LATENT_MAKERS = ("encoder.", "quant_conv.")
"""Prefixes of the weights that make the latent."""


class Tokenizer(nn.Module):
    """What the tokenizers of videos and of images share.

    Args:
        tokenizer_config: The architecture.
        modality: What the subclass takes.

    Raises:
        UserError: The architecture is of the other modality.
    """

    encoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    decoder: nn.Module

    def __init__(self, tokenizer_config: TokenizerConfig, modality: Modality) -> None:
        super().__init__()
        if tokenizer_config.modality != modality:
            raise user_error(
                "modality", tokenizer_config.modality, repr(modality), f"{type(self).__name__} takes no other."
            )
        self.tokenizer_config = tokenizer_config
        self.quantizer = None if tokenizer_config.levels is None else FSQuantizer(tokenizer_config.levels)

    def _latent(self, moments: Tensor) -> Tensor:
        """What `encode` returns of what `quant_conv` gives."""
        return moments if self.quantizer is None else self.quantizer(moments)[0]

    def _codes(self, latent: Tensor) -> Tensor:
        """What `post_quant_conv` takes for what `decode` is given."""
        check_latent(self.tokenizer_config, latent)
        if self.quantizer is None:
            return latent
        return self.quantizer.indices_to_codes(latent).to(next(self.post_quant_conv.parameters()).dtype)

    def _autoencode(self, picture: Tensor) -> Tensor:
        """Encodes and decodes, with a gradient through the quantizer."""
        return self.decoder(self.post_quant_conv(self.quantized(self.quant_conv(self.encoder(picture)))))

    def quantized(self, moments: Tensor) -> Tensor:
        """Returns the codes that a decoder gets in training for what `quant_conv` gives, with a gradient."""
        return moments if self.quantizer is None else self.quantizer(moments)[1]

    def fingerprint(self) -> str:
        """Returns the hex SHA-256 over the architecture and the weights that make the latent.

        The decoder does not count: with another decoder the same latents mean the same, so a decoder may be trained on
        while models of the latents stay what they are.

        Weights count by name and by their values in float32 (exact for bf16 and fp16), little-endian and contiguous,
        so the fingerprint depends neither on the device, nor on the memory layout, nor on a lossless change of dtype.
        """
        return fingerprint(self.tokenizer_config, self.state_dict())


def fingerprint(config: TokenizerConfig, tensors: Mapping[str, Tensor]) -> str:
    """Returns what `Tokenizer.fingerprint` gives, without a model.

    Args:
        config: The architecture.
        tensors: Every weight, by our name.
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(tensors.items()):
        if not name.startswith(LATENT_MAKERS):
            continue
        values = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


class CausalVideoTokenizer(Tokenizer):
    """Tokenizer of videos with 1 + k c_t frames (CV, DV); a picture is a video of one frame.

    No frame of the latent or of the reconstruction depends on a later frame.

    Args:
        tokenizer_config: The architecture.

    Raises:
        UserError: The architecture is an image tokenizer's.

    Source: arXiv 2501.03575 section 4.
    """

    def __init__(self, tokenizer_config: TokenizerConfig) -> None:
        super().__init__(tokenizer_config, "video")
        z_channels, latent_channels = tokenizer_config.num_z_channels, tokenizer_config.latent_channels
        self.encoder = Encoder(tokenizer_config)
        self.quant_conv = CausalConv3d(z_channels, latent_channels)
        self.post_quant_conv = CausalConv3d(latent_channels, z_channels)
        self.decoder = Decoder(tokenizer_config)

    def encode(self, video_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """Compresses a video.

        Args:
            video_BCTHW: Float [B, 3, 1 + k c_t, H, W] in [-1, 1]; H and W divisible by the spatial compression.
            past: For a video in chunks (`streaming.encode_stream`): the chunks before. All but the first chunk have
                k c_t frames and give k latent frames.

        Returns:
            Latent [B, latent_channels, 1 + k, H / c_s, W / c_s], not normalised; of a discrete tokenizer int32 indices
            without the channels.

        Raises:
            UserError: The shape does not fit the compression.
        """
        check_video_shape(self.tokenizer_config, tuple(video_BCTHW.shape), continues=not past.at_start)
        return self._latent(self.quant_conv(self.encoder(video_BCTHW, past)))

    def decode(self, latent: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """Rebuilds a video from its latent.

        Args:
            latent: Float [B, latent_channels, 1 + k, H / c_s, W / c_s] or integer [B, 1 + k, H / c_s, W / c_s] as
                `encode` gives it.
            past: For a latent in chunks (`streaming.decode_stream`): the chunks before.

        Returns:
            Float [B, 3, 1 + k c_t, H, W], about [-1, 1] but not clamped.

        Raises:
            UserError: The latent is not this tokenizer's: its axes or channels, its dtype, or an index.
        """
        return self.decoder(self.post_quant_conv(self._codes(latent)), past)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes: [B, 3, T, H, W] -> [B, 3, T, H, W]; gradients flow through a quantizer."""
        check_video_shape(self.tokenizer_config, tuple(video_BCTHW.shape))
        return self._autoencode(video_BCTHW)


class ImageTokenizer(Tokenizer):
    """Tokenizer of images (CI, DI).

    Args:
        tokenizer_config: The architecture.

    Raises:
        UserError: The architecture is a video tokenizer's.

    Source: `ContinuousImageTokenizer` and `DiscreteImageTokenizer` of NVIDIA cosmos-predict1 `tokenizer/networks`.
    """

    def __init__(self, tokenizer_config: TokenizerConfig) -> None:
        super().__init__(tokenizer_config, "image")
        z_channels, latent_channels = tokenizer_config.num_z_channels, tokenizer_config.latent_channels
        self.encoder = ImageEncoder(tokenizer_config)
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
        self.decoder = ImageDecoder(tokenizer_config)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Compresses images.

        Args:
            image_BCHW: Float [B, 3, H, W] in [-1, 1]; H and W divisible by the spatial compression.

        Returns:
            Latent [B, latent_channels, H / c_s, W / c_s], not normalised; of a discrete tokenizer int32 indices without
            the channels.

        Raises:
            UserError: The shape does not fit the compression.
        """
        check_image_shape(self.tokenizer_config, tuple(image_BCHW.shape))
        return self._latent(self.quant_conv(self.encoder(image_BCHW)))

    def decode(self, latent: Tensor) -> Tensor:
        """Rebuilds images from their latent.

        Args:
            latent: Float [B, latent_channels, H / c_s, W / c_s] or integer [B, H / c_s, W / c_s] as `encode` gives it.

        Returns:
            Float [B, 3, H, W], about [-1, 1] but not clamped.

        Raises:
            UserError: The latent is not this tokenizer's: its axes or channels, its dtype, or an index.
        """
        return self.decoder(self.post_quant_conv(self._codes(latent)))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Encodes and decodes: [B, 3, H, W] -> [B, 3, H, W]; gradients flow through a quantizer."""
        check_image_shape(self.tokenizer_config, tuple(image_BCHW.shape))
        return self._autoencode(image_BCHW)


def build_tokenizer(config: TokenizerConfig) -> CausalVideoTokenizer | ImageTokenizer:
    """Makes the tokenizer of an architecture, with torch's own first weights."""
    return ImageTokenizer(config) if config.modality == "image" else CausalVideoTokenizer(config)


def check_latent(config: TokenizerConfig, latent: Tensor) -> None:
    """Refuses what is no latent of this architecture.

    Args:
        config: The tokenizer's architecture.
        latent: What is to be decoded.

    Raises:
        UserError: Says what is expected.
    """
    grid = "T, H, W" if config.modality == "video" else "H, W"
    num_axes = 1 + len(grid.split(", "))
    if config.levels is None:
        fits = latent.ndim == num_axes + 1 and latent.shape[1] == config.latent_channels
        expected = f"[B, {config.latent_channels}, {grid}]"
    else:
        fits = latent.ndim == num_axes
        expected = f"[B, {grid}]"
    if not fits:
        raise user_error("latent shape", tuple(latent.shape), expected, "Give a latent of this tokenizer.")
    if config.levels is None:
        return
    if latent.is_floating_point() or latent.is_complex() or latent.dtype == torch.bool:
        raise user_error("latent dtype", latent.dtype, "integers", "Give the indices that `encode` returned.")
    size = config.vocab_size
    # One transfer from the device, for streams come here with every chunk.
    lowest, highest = torch.stack(latent.aminmax()).tolist() if latent.numel() else (0, 0)
    if lowest < 0 or highest >= size:
        got = (lowest, highest)
        raise user_error("indices", got, f"0 to {size - 1}", "Take special tokens out before decoding.")


def check_image_shape(config: TokenizerConfig, shape: tuple[int, ...]) -> None:
    """Refuses images that the compression does not divide.

    Args:
        config: The tokenizer's architecture.
        shape: The images' [B, C, H, W].

    Raises:
        UserError: With the nearest sizes that would do.
    """
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise user_error("image shape", shape, f"[B, {config.in_channels}, H, W]", "Bring the axes into this order.")
    _check_sides(config, *shape[2:])


def check_video_shape(config: TokenizerConfig, shape: tuple[int, ...], *, continues: bool = False) -> None:
    """Refuses a video that the compression does not divide.

    Args:
        config: The tokenizer's architecture.
        shape: The video's [B, C, T, H, W].
        continues: Whether it is a chunk that continues a video.

    Raises:
        UserError: With the nearest sizes that would do.
    """
    if len(shape) != 5 or shape[1] != config.in_channels:
        raise user_error("video shape", shape, f"[B, {config.in_channels}, T, H, W]", "Bring the axes into this order.")
    _, _, num_frames, height, width = shape
    step = config.temporal_compression
    rule, first = (f"a multiple of {step}", step) if continues else (f"1 + a multiple of {step}", 1)
    if (num_frames - first) % step or num_frames < 1:
        _refuse("number of frames", num_frames, rule, _around(num_frames, step, start=first))
    _check_sides(config, height, width)


def _check_sides(config: TokenizerConfig, height: int, width: int) -> None:
    step = config.spatial_compression
    for name, value in (("height", height), ("width", width)):
        if value % step or value < 1:
            _refuse(name, value, f"a multiple of {step}", _around(value, step, start=step))


def _around(value: int, step: int, *, start: int) -> list[int]:
    """Returns the nearest members of start, start + step, ... below and above `value`."""
    below = start + max(0, (value - start) // step) * step
    return sorted({below, below if value <= below else below + step})


def _refuse(name: str, value: int, rule: str, nearest: list[int]) -> None:
    choices = " or ".join(str(size) for size in nearest)
    raise user_error(name, value, rule, f"The nearest that would do: {choices}. Crop, pad or resize it.")
