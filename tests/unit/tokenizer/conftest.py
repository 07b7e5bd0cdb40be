import pytest
import torch

from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer

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


def random_tokenizer(config: TokenizerConfig, seed: int = 0) -> CausalVideoTokenizer:
    """A tokenizer whose norms and biases differ from their trivial start, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = CausalVideoTokenizer(config).eval()
    with torch.no_grad():
        for name, weight in tokenizer.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return tokenizer


@pytest.fixture
def tiny() -> CausalVideoTokenizer:
    return random_tokenizer(TINY)
