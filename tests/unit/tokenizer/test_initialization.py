import torch

from nemo_cosmos.tokenizer.initialization import initialize
from nemo_cosmos.tokenizer.layers import ResnetBlock
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from tests.unit.tokenizer.conftest import TINY


def fresh() -> CausalVideoTokenizer:
    torch.manual_seed(0)
    tokenizer = CausalVideoTokenizer(TINY)
    initialize(tokenizer)
    return tokenizer


def video() -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_video_reaches_the_latent_and_the_picture_starts_grey() -> None:
    torch.manual_seed(0)
    torchs_own = CausalVideoTokenizer(TINY)
    with torch.no_grad():
        latent, latent_before = fresh().encode(video()), torchs_own.encode(video())
        # Across samples and places, that is, what a decoder could tell two videos apart by.
        assert latent.std(dim=(0, 2, 3, 4)).mean() > 0.2
        assert latent.std(dim=(0, 2, 3, 4)).mean() > 3 * latent_before.std(dim=(0, 2, 3, 4)).mean()
        assert fresh().decode(latent).abs().mean() < 0.2


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
