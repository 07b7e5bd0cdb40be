import hashlib

import pytest
import torch
from diffusers import AutoencoderKLCosmos

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.conversion import diffusers_config
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, check_video_shape
from nemo_cosmos.tokenizer.state_dict import diffusers_name, to_diffusers_names
from tests.unit.tokenizer.conftest import DISCRETE, ODD, OTHER_DECODER, TINY, random_tokenizer

CASES = [
    (TINY, (1, 3, 1, 32, 48)),
    (TINY, (2, 3, 9, 64, 32)),
    (TINY, (1, 3, 17, 32, 32)),
    (ODD, (1, 3, 1, 32, 48)),
    (ODD, (2, 3, 9, 16, 40)),
    (ODD, (1, 3, 17, 32, 32)),
    (OTHER_DECODER, (2, 3, 9, 32, 48)),
]


def video(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def twin(tokenizer: CausalVideoTokenizer) -> AutoencoderKLCosmos:
    config = tokenizer.tokenizer_config
    other = AutoencoderKLCosmos(**{k: v for k, v in diffusers_config(config).items() if k != "_class_name"})
    other.load_state_dict(to_diffusers_names(tokenizer.state_dict(), config))
    return other.to(next(tokenizer.parameters()).dtype).eval()


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_parity_with_diffusers(config: TokenizerConfig, shape: tuple[int, ...]) -> None:
    tokenizer = random_tokenizer(config)
    # Pixels are sums of 64 coefficients; at this scale they stay in the range of a trained model's.
    tokenizer.decoder.conv_out[1].conv3d.weight.data.mul_(0.02)
    tokenizer.decoder.conv_out[1].conv3d.bias.data.mul_(0.02)
    other, x = twin(tokenizer), video(shape)
    with torch.no_grad():
        latent, latent_other = tokenizer.encode(x), other.encode(x).latent_dist.mode()
        rebuilt, rebuilt_other = tokenizer.decode(latent_other), other.decode(latent_other).sample
    assert latent.shape == (shape[0], *config.latent_shape(*shape[2:]))
    assert rebuilt.shape == x.shape
    assert rebuilt_other.abs().max() > 0.1
    assert (latent - latent_other).abs().max() <= 1e-5
    assert (rebuilt - rebuilt_other).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [TINY, ODD])
def test_gradients_equal_diffusers_in_double_precision(config: TokenizerConfig) -> None:
    tokenizer = random_tokenizer(config).double()
    other, x = twin(tokenizer), video((1, 3, 9, 16, 24), torch.float64)
    for patcher in (other.encoder.patch_embed, other.decoder.unpatch_embed):
        patcher.wavelets.fill_(0.5**0.5)  # the taps are stored in float32, good to 3e-8 only
    x_other = x.clone().requires_grad_()
    x.requires_grad_()
    tokenizer(x).square().mean().backward()
    other(x_other).sample.square().mean().backward()
    assert (x.grad - x_other.grad).abs().max() <= 1e-10 * x_other.grad.abs().max()
    theirs = dict(other.named_parameters())
    for name, weight in tokenizer.named_parameters():
        expected = theirs[diffusers_name(name, config.num_decoder_levels)].grad
        assert (weight.grad - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("config", [TINY, ODD, DISCRETE])
def test_no_frame_depends_on_later_ones(config: TokenizerConfig) -> None:
    tokenizer = random_tokenizer(config)
    step = config.temporal_compression
    for cut in range(3):
        x, y = video((1, 3, 1 + 2 * step, 32, 32)), video((1, 3, 1 + 2 * step, 32, 32))
        y[:, :, 1 + cut * step :] = 0.5
        with torch.no_grad():
            x_latent, y_latent = tokenizer.encode(x), tokenizer.encode(y)
            x_back, y_back = tokenizer.decode(x_latent), tokenizer.decode(y_latent)
        # Each frame is computed by the same operations on the same numbers: equal but for the order of sums.
        # Time is the last axis but two, also of indices.
        difference = (x_latent - y_latent).abs().movedim(-3, 0)
        assert difference[: 1 + cut].max() <= 1e-5
        frames = 1 + cut * step
        assert (x_back[:, :, :frames] - y_back[:, :, :frames]).abs().max() <= 1e-5 * x_back.abs().max()
        if cut < 2:
            assert difference[1 + cut :].max() > 1e-2


@pytest.mark.parametrize("config", [TINY, ODD, DISCRETE])
def test_an_image_is_the_first_frame(config: TokenizerConfig) -> None:
    tokenizer, x = random_tokenizer(config), video((1, 3, 1 + config.temporal_compression, 32, 48))
    with torch.no_grad():
        latent, image_latent = tokenizer.encode(x), tokenizer.encode(x[:, :, :1])
        rebuilt, image = tokenizer.decode(latent), tokenizer.decode(image_latent)
    assert (latent[..., :1, :, :] - image_latent).abs().max() <= 1e-5
    assert (rebuilt[:, :, :1] - image).abs().max() <= 1e-5 * image.abs().max()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 64, 64), "number of frames: got 16, expected 1 \\+ a multiple of 8.*: 9 or 17"),
        ((1, 3, 0, 64, 64), "number of frames: got 0.*would do: 1\\."),
        ((1, 3, 9, 60, 64), "height: got 60, expected a multiple of 8.*: 56 or 64"),
        ((1, 3, 9, 64, 4), "width: got 4, .*would do: 8\\."),
        ((3, 9, 64, 64), "video shape"),
        ((1, 4, 9, 64, 64), "video shape"),
    ],
)
def test_bad_video_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_video_shape(TINY, shape)


def test_encode_and_decode_check_shapes(tiny: CausalVideoTokenizer) -> None:
    with pytest.raises(UserError, match="number of frames"):
        tiny.encode(torch.zeros(1, 3, 2, 8, 8))
    with pytest.raises(UserError, match="latent shape"):
        tiny.decode(torch.zeros(1, 3, 1, 2, 2))


def test_a_discrete_latent_is_indices() -> None:
    tokenizer, x = random_tokenizer(DISCRETE), video((2, 3, 9, 32, 48))
    with torch.no_grad():
        indices = tokenizer.encode(x)
        rebuilt, direct = tokenizer.decode(indices), tokenizer(x)
    assert indices.shape == (2, *DISCRETE.latent_shape(9, 32, 48)) == (2, 2, 2, 3)
    assert indices.dtype == torch.int32
    assert len(indices.unique()) > 1
    assert rebuilt.shape == x.shape
    assert (rebuilt - direct).abs().max() <= 1e-5 * direct.abs().max()
    assert (tokenizer.decode(indices.long()) - rebuilt).abs().max() <= 1e-5 * direct.abs().max()
    assert tokenizer.bfloat16().decode(indices).dtype == torch.bfloat16


def test_bad_indices_are_refused() -> None:
    tokenizer, indices = random_tokenizer(DISCRETE), torch.zeros(1, 2, 2, 2, dtype=torch.int32)
    indices[0, 1, 0, 0] = 64_000
    with pytest.raises(UserError, match=r"indices: got \(0, 64000\), expected '?0 to 63999"):
        tokenizer.decode(indices)
    with pytest.raises(UserError, match="indices: got .-64000, 0."):
        tokenizer.decode(-indices)
    with pytest.raises(UserError, match="latent dtype: got torch.float32, expected integers"):
        tokenizer.decode(torch.zeros(1, 2, 2, 2))
    with pytest.raises(UserError, match=r"latent shape.*\[B, T, H, W\]"):
        tokenizer.decode(torch.zeros(1, 6, 2, 2, 2))


def test_fingerprint(tiny: CausalVideoTokenizer) -> None:
    first = tiny.fingerprint()
    assert len(first) == hashlib.sha256().digest_size * 2
    assert first == random_tokenizer(TINY).fingerprint()
    assert tiny.bfloat16().fingerprint() == tiny.float().fingerprint() != first
    before = tiny.fingerprint()
    tiny.decoder.up[0].block[0].conv1[0].conv3d.weight.data[0, 0, 0, 0, 0] += 1e-3
    assert tiny.fingerprint() == before
    tiny.quant_conv.conv3d.weight.data[0, 0, 0, 0, 0] += 1e-3
    assert tiny.fingerprint() != before
    other_patching = TokenizerConfig(**TINY.to_dict() | {"patch_method": "rearrange", "channels_mult": (2, 4, 4)})
    same_weights = CausalVideoTokenizer(other_patching)
    same_weights.load_state_dict(random_tokenizer(TINY).state_dict())
    assert same_weights.fingerprint() != first
