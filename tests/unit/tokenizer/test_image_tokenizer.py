import dataclasses
import re

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, ImageTokenizer, build_tokenizer
from tests.unit.tokenizer.conftest import DISCRETE_IMAGE, IMAGE, TINY, random_tokenizer

# diffusers' networks of Stable Diffusion's VAE are the same where the first level is as wide as the first convolution
# and all levels but one resample: both come from latent diffusion.
NAMES = (
    (r"^down\.(\d+)\.", r"down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"^mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"^mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^norm_out\.", "conv_norm_out."),
)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def twin(network: torch.nn.Module, other: torch.nn.Module) -> torch.nn.Module:
    """Gives diffusers' network our weights."""
    renamed = {}
    for name, weight in network.state_dict().items():
        name = re.sub(r"^up\.(\d+)\.", lambda match: f"up_blocks.{len(network.up) - 1 - int(match[1])}.", name)
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        renamed[name] = weight.flatten(1) if "attentions" in name and weight.ndim == 4 else weight
    other.load_state_dict(renamed)
    return other.double().eval()


def test_networks_equal_diffusers_in_double_precision() -> None:
    tokenizer, widths = random_tokenizer(IMAGE).double(), [32, 64, 64]
    levels = {"block_out_channels": widths, "layers_per_block": 1}
    encoder = twin(
        tokenizer.encoder,
        Encoder(12, 6, down_block_types=["DownEncoderBlock2D"] * 3, double_z=False, **levels),
    )
    decoder = twin(tokenizer.decoder, Decoder(6, 12, up_block_types=["UpDecoderBlock2D"] * 3, **levels))
    x = images(2, 3, 32, 48).double()
    with torch.no_grad():
        z, expected = tokenizer.encoder(x), encoder(tokenizer.encoder.patcher(x))
        rebuilt, rebuilt_expected = tokenizer.decoder(z), tokenizer.decoder.unpatcher(decoder(z))
    assert (z - expected).abs().max() <= 1e-12
    assert (rebuilt - rebuilt_expected).abs().max() <= 1e-12
    assert min(z.std(), rebuilt.std()) > 0.1


@pytest.mark.parametrize("config", [IMAGE, DISCRETE_IMAGE])
def test_shapes(config) -> None:
    tokenizer, x = random_tokenizer(config), images(2, 3, 32, 48)
    with torch.no_grad():
        latent = tokenizer.encode(x)
        rebuilt = tokenizer.decode(latent)
        assert (tokenizer(x) - rebuilt).abs().max() <= 1e-5
    assert latent.shape == (2, *config.latent_shape(32, 48))
    assert latent.dtype == (torch.float32 if config.levels is None else torch.int32)
    assert rebuilt.shape == x.shape


def test_images_of_a_batch_are_coded_alone() -> None:
    tokenizer, x = random_tokenizer(IMAGE), images(3, 3, 16, 16)
    with torch.no_grad():
        together, alone = tokenizer.encode(x), torch.cat([tokenizer.encode(image[None]) for image in x])
    assert (together - alone).abs().max() <= 1e-5


def test_gradients_flow_through_the_quantizer() -> None:
    tokenizer = random_tokenizer(DISCRETE_IMAGE)
    tokenizer(images(1, 3, 32, 32)).square().mean().backward()
    for name, weight in tokenizer.named_parameters():
        # Of the keys' bias softmax sees nothing.
        assert weight.grad.abs().max() > 0 or name.endswith("k.bias"), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 20, 16), "height: got 20, expected a multiple of 8.*: 16 or 24"),
        ((1, 3, 16, 4), "width: got 4, .*would do: 8\\."),
        ((1, 3, 1, 16, 16), "image shape"),
        ((1, 4, 16, 16), "image shape"),
    ],
)
def test_bad_image_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    tokenizer = random_tokenizer(IMAGE)
    for call in (tokenizer.encode, tokenizer):
        with pytest.raises(UserError, match=message):
            call(torch.zeros(shape))


def test_bad_latents_are_refused() -> None:
    with pytest.raises(UserError, match=r"latent shape: got .*expected '?\[B, 6, H, W\]"):
        random_tokenizer(IMAGE).decode(torch.zeros(1, 6, 1, 2, 2))
    with pytest.raises(UserError, match=r"latent shape: got .*expected '?\[B, H, W\]"):
        random_tokenizer(DISCRETE_IMAGE).decode(torch.zeros(1, 6, 2, 2))


def test_each_modality_has_its_class() -> None:
    assert isinstance(build_tokenizer(IMAGE), ImageTokenizer)
    assert isinstance(build_tokenizer(TINY), CausalVideoTokenizer)
    with pytest.raises(UserError, match="modality: got 'image', expected 'video'"):
        CausalVideoTokenizer(IMAGE)
    with pytest.raises(UserError, match="modality: got 'video', expected 'image'"):
        ImageTokenizer(TINY)


def test_fingerprint_tells_codebooks_apart() -> None:
    one = random_tokenizer(DISCRETE_IMAGE)
    other = build_tokenizer(dataclasses.replace(DISCRETE_IMAGE, levels=(5, 5, 5, 8, 8, 8)))
    other.load_state_dict(one.state_dict())
    assert one.fingerprint() == random_tokenizer(DISCRETE_IMAGE).fingerprint() != other.fingerprint()
