import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer.config import PRESETS, RELEASED, TokenizerConfig, preset
from nemo_cosmos.tokenizer.decoder import up_axes
from nemo_cosmos.tokenizer.model import build_tokenizer
from nemo_cosmos.tokenizer.weights import DEFAULT_WEIGHTS, load_default

NUM_PARAMETERS = {
    "CI8x8": 76_789_472,
    "CI16x16": 81_509_088,
    "DI8x8": 79_004_342,
    "DI16x16": 83_723_958,
    "CV4x8x8": 85_783_232,
    "CV8x8x8": 105_653_696,
    "CV8x16x16": 110_898_624,
    "DV4x8x8": 104_669_558,
    "DV8x8x8": 105_653_366,
    "DV8x16x16": 110_898_294,
    "CI8x8-360p": 81_384_636,
    "CI16x16-360p": 84_334_524,
    "DI8x8-360p": 83_599_506,
    "DI16x16-360p": 86_549_394,
    "CV4x8x8-360p": 110_208_816,
    "CV8x8x8-720p": 105_653_696,
    "DV4x8x8-360p": 112_619_766,
    "DV8x16x16-720p": 110_898_294,
    "CV8x8x8-tiny": 12_251_904,
    "DV8x8x8-tiny": 3_749_620,
    "CI8x8-tiny": 2_663_792,
    "DI8x8-tiny": 2_663_462,
}
"""Counted in the published modules, without the convolutions that the first releases hold and never run."""


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        tokenizer = build_tokenizer(preset(name))
    assert sum(weight.numel() for weight in tokenizer.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_are_called(name: str) -> None:
    assert preset(name).compression_name == name.split("-")[0]


def test_every_published_name_has_its_preset() -> None:
    assert len(RELEASED) == 10 + 10 + 2 + 8
    for name, architecture in RELEASED.items():
        assert preset(name) == preset(f"nvidia/{name}") == PRESETS[architecture]
        assert PRESETS[architecture].compression_name in name
    assert {name: preset(f"Cosmos-Tokenize1-{name}").patch_size for name in ("CV8x8x8-720p", "DI8x8-360p")} == {
        "CV8x8x8-720p": 4,
        "DI8x8-360p": 2,
    }
    assert preset("Cosmos-0.1-Tokenizer-DI8x8").patch_size == 4


def test_older_configs_read_as_before() -> None:
    """Fingerprints are taken over them."""
    assert sorted(TokenizerConfig().to_dict()) == [
        "channels",
        "channels_mult",
        "in_channels",
        "latent_channels",
        "num_res_blocks",
        "patch_method",
        "patch_size",
        "spatial_compression",
        "temporal_compression",
    ]
    # The embedded world model names the tokenizer whose latents it was trained on.
    card = read_json(DEFAULT_WEIGHTS.with_name("diffusion_tiny_text2world.json"))
    assert load_default().fingerprint() == card["tokenizer_fingerprint"]


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), TokenizerConfig(channels_mult=(1, 2, 2), patch_method="rearrange")]
)
def test_json_round_trip(config: TokenizerConfig) -> None:
    assert TokenizerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 0}, "channels: got 0, expected a positive integer"),
        ({"channels_mult": (2,)}, "channels_mult"),
        ({"patch_size": 3}, "patch_size: got 3, expected a power of two"),
        ({"patch_method": "dct"}, "patch_method: got 'dct'"),
        ({"temporal_compression": 2}, "temporal_compression: got 2, expected between patch_size 4 and 16"),
        ({"spatial_compression": 32}, "spatial_compression: got 32"),
        ({"decoder_channels_mult": (2,)}, "decoder_channels_mult: got .2,."),
        ({"spatial_compression": 4}, "temporal_compression: got 8, expected 'at most spatial_compression 4|at most"),
        ({"channels_mult": (1, 2)}, "levels of the decoder: got 2, expected at least 3"),
        ({"patch_size": 2}, "levels of the decoder: got 3, expected at least 4"),
        ({"decoder_channels_mult": (1, 2)}, "levels of the decoder: got 2, expected at least 3"),
        ({"modality": "audio"}, "modality: got 'audio'"),
        ({"z_channels": 0}, "z_channels: got 0"),
        ({"levels": (8, 8)}, "levels: got .8, 8., expected latent_channels 16 numbers"),
        ({"levels": (8, 1), "latent_channels": 2}, "levels: got .8, 1."),
        ({"modality": "image"}, "temporal_compression: got 8, expected 1"),
        ({"modality": "image", "temporal_compression": 1, "channels": 48}, "channels: got 48, expected a multiple of"),
        ({"modality": "image", "temporal_compression": 1, "spatial_compression": 64}, "between patch_size 4 and 32"),
    ],
)
def test_impossible_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**values)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown|only known fields"):
        TokenizerConfig.from_dict({"chanels": 128})
    with pytest.raises(UserError, match="CV8x8x8-720p"):
        preset("CV9")


@pytest.mark.parametrize(
    ("spatial", "temporal", "patch", "expected"),
    [  # (space, time) per decoder level from coarse to fine, worked out by hand from the reference's rule
        (8, 8, 4, [(False, False), (True, True), (False, False)]),
        (16, 8, 4, [(True, False), (True, True), (False, False)]),
        (8, 4, 2, [(True, False), (True, True), (False, False)]),
        (8, 4, 4, [(True, False), (False, False), (False, False)]),
        (8, 8, 8, [(False, False), (False, False), (False, False)]),
    ],
)
def test_decoder_levels(spatial: int, temporal: int, patch: int, expected: list) -> None:
    config = TokenizerConfig(spatial_compression=spatial, temporal_compression=temporal, patch_size=patch)
    assert up_axes(config) == expected


def test_latent_shape() -> None:
    assert preset("CV8x8x8-tiny").latent_shape(17, 128, 64) == (16, 3, 16, 8)
    assert preset("DV8x16x16-720p").latent_shape(49, 640, 1024) == (7, 40, 64)
    assert preset("CI16x16-360p").latent_shape(128, 64) == (16, 8, 4)
    assert preset("DI8x8-360p").latent_shape(128, 64) == (16, 8)
