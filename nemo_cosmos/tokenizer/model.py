"""The causal video tokenizer: encoder, decoder and the two pointwise convolutions around the latent."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.causal_cache import CausalCache, starts_video
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.decoder import Decoder
from nemo_cosmos.tokenizer.encoder import Encoder
from nemo_cosmos.tokenizer.layers import CausalConv3d

LATENT_MAKERS = ("encoder.", "quant_conv.")
"""Prefixes of the weights that make the latent."""


class CausalVideoTokenizer(nn.Module):
    """Continuous tokenizer of videos with 1 + k c_t frames; a picture is a video of one frame.

    No frame of the latent or of the reconstruction depends on a later frame.

    Args:
        tokenizer_config: The architecture.

    Source: arXiv 2501.03575 section 4.
    """

    def __init__(self, tokenizer_config: TokenizerConfig) -> None:
        super().__init__()
        self.tokenizer_config = tokenizer_config
        channels = tokenizer_config.latent_channels
        self.encoder = Encoder(tokenizer_config)
        self.quant_conv = CausalConv3d(channels, channels)
        self.post_quant_conv = CausalConv3d(channels, channels)
        self.decoder = Decoder(tokenizer_config)

    def encode(self, video_BCTHW: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Compresses a video.

        Args:
            video_BCTHW: Float [B, 3, 1 + k c_t, H, W] in [-1, 1]; H and W divisible by the spatial compression.
            cache: For a video in chunks (`streaming.encode_stream`): the chunks before. All but the first chunk have
                k c_t frames and give k latent frames.

        Returns:
            Latent [B, latent_channels, 1 + k, H / c_s, W / c_s], not normalised.

        Raises:
            UserError: The shape does not fit the compression.
        """
        check_video_shape(self.tokenizer_config, tuple(video_BCTHW.shape), continues=not starts_video(cache))
        return self.quant_conv(self.encoder(video_BCTHW, cache))

    def decode(self, latent_BCTHW: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Rebuilds a video from its latent.

        Args:
            latent_BCTHW: Float [B, latent_channels, 1 + k, H / c_s, W / c_s] as `encode` gives it.
            cache: For a latent in chunks (`streaming.decode_stream`): the chunks before.

        Returns:
            Float [B, 3, 1 + k c_t, H, W], about [-1, 1] but not clamped.

        Raises:
            UserError: The number of axes or channels is wrong.
        """
        shape, channels = tuple(latent_BCTHW.shape), self.tokenizer_config.latent_channels
        if len(shape) != 5 or shape[1] != channels:
            raise user_error("latent shape", shape, f"[B, {channels}, T, H, W]", "Give a latent of this tokenizer.")
        return self.decoder(self.post_quant_conv(latent_BCTHW), cache)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes: [B, 3, T, H, W] -> [B, 3, T, H, W]."""
        return self.decode(self.encode(video_BCTHW))

    def fingerprint(self) -> str:
        """Returns the hex SHA-256 over the architecture and the weights that make the latent.

        The decoder does not count: with another decoder the same latents mean the same, so a decoder may be trained on
        while models of the latents stay what they are.

        Weights count by name and by their values in float32 (exact for bf16 and fp16), little-endian and contiguous,
        so the fingerprint depends neither on the device, nor on the memory layout, nor on a lossless change of dtype.
        """
        digest = hashlib.sha256(json.dumps(self.tokenizer_config.to_dict(), sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            if not name.startswith(LATENT_MAKERS):
                continue
            values = weight.detach().to("cpu", torch.float32).contiguous().numpy()
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(values.astype("<f4").tobytes())
        return digest.hexdigest()


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
    raise user_error(name, value, rule, f"The nearest that would do: {choices}. Crop, pad or resize the video.")
