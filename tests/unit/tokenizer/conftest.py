import dataclasses

import pytest
import torch

from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, ImageTokenizer, build_tokenizer

TINY = TokenizerConfig(channels=16, num_res_blocks=1)
ODD = TokenizerConfig(
    channels=8,
    channels_mult=(1, 3, 2),
    num_res_blocks=2,
    latent_channels=6,
    patch_size=2,
    spatial_compression=8,
    temporal_compression=4,
)
"""Widths that go up and down, two levels of space, one of time."""

OTHER_DECODER = TokenizerConfig(channels=16, num_res_blocks=1, temporal_compression=4, decoder_channels_mult=(2, 4))
"""As the first CV4x8x8: a level less in the decoder."""

CODE = {"levels": (8, 8, 8, 5, 5, 5), "latent_channels": 6, "z_channels": 10}
"""A codebook of 64,000 and another width before it."""
DISCRETE = TokenizerConfig(channels=16, num_res_blocks=1, **CODE, spatial_compression=16)
IMAGE = TokenizerConfig(
    modality="image",
    channels=32,
    channels_mult=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=6,
    patch_size=2,
    temporal_compression=1,
)
"""Two of three levels resample."""
DISCRETE_IMAGE = dataclasses.replace(IMAGE, **CODE, spatial_compression=16)
"""All levels resample."""


def random_tokenizer(config: TokenizerConfig, seed: int = 0) -> CausalVideoTokenizer | ImageTokenizer:
    """A tokenizer whose norms and biases differ from their trivial start, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer(config).eval()
    with torch.no_grad():
        for name, weight in tokenizer.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    if config.levels is not None:
        spread_codes(tokenizer, generator)
    return tokenizer


@torch.no_grad()
def spread_codes(tokenizer: CausalVideoTokenizer | ImageTokenizer, generator: torch.Generator) -> None:
    """Gives what is quantised mean 0 and spread 1 over a picture of noise; random weights leave it all but constant."""
    config = tokenizer.tokenizer_config
    size = 4 * config.spatial_compression
    shape = (1, 3, 1 + config.temporal_compression, size, size) if config.modality == "video" else (1, 3, size, size)
    z = tokenizer.quant_conv(tokenizer.encoder(torch.rand(shape, generator=generator) * 2 - 1)).movedim(1, 0).flatten(1)
    weight, bias = tokenizer.quant_conv.parameters()
    std, mean = torch.std_mean(z, dim=1)
    weight.div_(std.view(-1, *[1] * (weight.ndim - 1)))
    bias.sub_(mean).div_(std)


@pytest.fixture
def tiny() -> CausalVideoTokenizer:
    return random_tokenizer(TINY)
