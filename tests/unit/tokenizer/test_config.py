import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import PRESETS, TokenizerConfig, preset
from nemo_cosmos.tokenizer.decoder import up_axes
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer


@pytest.mark.parametrize(("name", "num_parameters"), [("CV8x8x8-720p", 105_653_696), ("CV8x8x8-tiny", 12_251_904)])
def test_parameter_counts(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        tokenizer = CausalVideoTokenizer(preset(name))
    assert sum(weight.numel() for weight in tokenizer.parameters()) == num_parameters


@pytest.mark.parametrize("config", [*PRESETS.values(), TokenizerConfig(channels_mult=(1, 2), patch_method="rearrange")])
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
        (8, 8, 8, [(False, False), (False, False), (False, False)]),
    ],
)
def test_decoder_levels(spatial: int, temporal: int, patch: int, expected: list) -> None:
    config = TokenizerConfig(spatial_compression=spatial, temporal_compression=temporal, patch_size=patch)
    assert up_axes(config) == expected


def test_latent_shape() -> None:
    assert preset("CV8x8x8-tiny").latent_shape(17, 128, 64) == (16, 3, 16, 8)
