import dataclasses

import pytest
import torch

from nemo_cosmos.tokenizer.initialization import coarsest_bands, initialize
from nemo_cosmos.tokenizer.layers import ResnetBlock
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.tokenizer.patching import Unpatcher
from tests.unit.tokenizer.conftest import DISCRETE, TINY


def fresh() -> CausalVideoTokenizer:
    torch.manual_seed(0)
    tokenizer = CausalVideoTokenizer(TINY)
    initialize(tokenizer)
    return tokenizer


def video() -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ramp_video(num_frames: int = 9) -> torch.Tensor:
    """A tinted grey ramp that stands still: what the coarsest bands can hold."""
    column = torch.linspace(-1, 1, 32).expand(1, 3, num_frames, 32, 32)
    tint = torch.tensor([0.3, 0.0, -0.3]).view(1, 3, 1, 1, 1)
    return 0.5 * column + tint


def test_an_untrained_tokenizer_is_a_coarse_codec() -> None:
    torch.manual_seed(0)
    torchs_own = CausalVideoTokenizer(TINY)
    smooth = ramp_video()
    with torch.no_grad():
        error = (fresh()(smooth) - smooth).abs().mean()
        assert error < 0.6 * smooth.abs().mean()
        assert error < 0.7 * (torchs_own(smooth) - smooth).abs().mean()


@pytest.mark.parametrize("method", ["haar", "rearrange"])
def test_the_bands_are_taken_out_and_put_back(method: str) -> None:
    config = dataclasses.replace(TINY, patch_method=method)
    analysis, synthesis = coarsest_bands(config, 6)
    torch.testing.assert_close(analysis @ synthesis, torch.eye(6), atol=1e-6, rtol=0)


def test_the_first_bands_are_brightness_and_its_slopes() -> None:
    _, synthesis = coarsest_bands(TINY, 4)
    # The patches of a second latent frame, for the first one keeps a single frame of its own.
    patches = synthesis.T.reshape(4, -1, 1, 1, 1).repeat(1, 1, 2, 1, 1)
    pixels = Unpatcher(TINY.patch_size, TINY.patch_method)(patches)[:, :, 1:]
    torch.testing.assert_close(pixels, pixels.mean(dim=1, keepdim=True).expand_as(pixels))
    varies = [{axis for axis in (1, 2, 3) if one.std(axis).max() > 1e-6} for one in pixels]
    assert varies[0] == set(), "brightness has no shape"
    assert sorted(varies[1:], key=list) == [{1}, {2}, {3}], "one slope along each of time, height and width"


def test_more_signals_than_a_patch_holds_leave_the_rest_silent() -> None:
    config = dataclasses.replace(TINY, patch_size=2, spatial_compression=4, temporal_compression=4)
    analysis, synthesis = coarsest_bands(config, 30)
    assert analysis[24:].abs().max() == synthesis[:, 24:].abs().max() == 0


def test_residual_blocks_start_as_their_shortcut() -> None:
    tokenizer = fresh()
    x = torch.randn(1, 32, 2, 4, 4)
    block = next(m for m in tokenizer.modules() if isinstance(m, ResnetBlock) and m.norm1.norm.num_channels == 32)
    assert torch.equal(block(x), block.nin_shortcut(x))


def test_every_weight_but_those_behind_a_silent_end_gets_a_gradient() -> None:
    tokenizer = fresh()
    (tokenizer(video()) - video()).abs().mean().backward()
    for name in ("encoder.conv_in.0", "encoder.mid.block_1.conv2.1", "encoder.down.0.downsample.conv1", "quant_conv"):
        assert tokenizer.get_parameter(f"{name}.conv3d.weight").grad.abs().max() > 0, name


def test_the_start_follows_the_seed() -> None:
    assert fresh().fingerprint() == fresh().fingerprint()


def test_a_discrete_tokenizer_starts_with_several_codes() -> None:
    torch.manual_seed(0)
    tokenizer = CausalVideoTokenizer(DISCRETE)
    initialize(tokenizer)
    assert len(tokenizer.encode(video()).unique()) > 4
    (tokenizer(video()) - video()).abs().mean().backward()
    assert tokenizer.encoder.conv_in[0].conv3d.weight.grad.abs().max() > 0
