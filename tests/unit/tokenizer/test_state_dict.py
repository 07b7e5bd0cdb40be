import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCosmos

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.tokenizer import conversion, published, weights
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer.config import PRESETS, TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from tests.unit.tokenizer.conftest import DISCRETE, DISCRETE_IMAGE, IMAGE, ODD, TINY, random_tokenizer


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", [*(c for c in PRESETS.values() if c.family == "CV"), TINY, ODD])
def test_every_name_of_diffusers_is_reached(config: TokenizerConfig) -> None:
    values = {k: v for k, v in conversion.diffusers_config(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs, ours = AutoencoderKLCosmos(**values).state_dict(), CausalVideoTokenizer(config).state_dict()
    renamed = names.to_diffusers_names(ours, config)
    assert {name: weight.shape for name, weight in renamed.items()} == {n: w.shape for n, w in theirs.items()}


def test_released_configuration_of_diffusers_is_the_720p_preset() -> None:
    assert conversion.config_of_diffusers({"_class_name": "AutoencoderKLCosmos"}) == PRESETS["CV8x8x8-720p"]


@pytest.mark.parametrize("config", [c for c in PRESETS.values() if c.family == "CV"])
def test_config_of_diffusers_goes_there_and_back(config: TokenizerConfig) -> None:
    assert conversion.config_of_diffusers(conversion.diffusers_config(config)) == config


@pytest.mark.parametrize("config", [TINY, ODD])
def test_names_of_diffusers_go_there_and_back(config: TokenizerConfig) -> None:
    ours = random_tokenizer(config).state_dict()
    assert_same(names.from_diffusers_names(names.to_diffusers_names(ours, config), config), ours)


@pytest.mark.parametrize("config", [TINY, ODD, DISCRETE, IMAGE, DISCRETE_IMAGE])
def test_names_of_the_reference_go_there_and_back(config: TokenizerConfig) -> None:
    ours = random_tokenizer(config).state_dict()
    assert_same(names.from_reference_names(names.to_reference_names(ours, config), config), ours)
    assert_same(names.from_reference_names(ours, config), ours)


@pytest.mark.parametrize("config", [DISCRETE, IMAGE, dataclasses.replace(TINY, z_channels=8)])
def test_diffusers_has_no_other_family(config: TokenizerConfig) -> None:
    weights = random_tokenizer(config).state_dict()
    for call in (names.to_diffusers_names, names.from_diffusers_names):
        with pytest.raises(UserError, match="architecture: got .*expected 'CV, z_channels|architecture: got .*CV"):
            call(weights, config)
    with pytest.raises(UserError, match="diffusers has no class"):
        conversion.diffusers_config(config)


VIDEO_NAMES = (
    "encoder.patcher3d.wavelets",
    "encoder.patcher3d.patch_size_buffer",
    "decoder.unpatcher3d._arange",
    "encoder.conv_in.0.conv3d.weight",
    "encoder.down.1.block.0.nin_shortcut.conv3d.bias",
    "encoder.down.0.downsample.conv1.conv3d.weight",
    "encoder.mid.attn_1.1.proj_out.conv3d.weight",
    "decoder.up.1.upsample.conv3.conv3d.weight",
    "decoder.norm_out.norm.weight",
    "post_quant_conv.conv3d.bias",
)
IMAGE_NAMES = (
    "encoder.patcher.wavelets",
    "decoder.unpatcher._arange",
    "encoder.conv_in.weight",
    "encoder.down.1.block.0.nin_shortcut.bias",
    "encoder.down.0.block.0.norm1.weight",
    "encoder.down.1.downsample.conv.weight",
    "encoder.mid.attn_1.proj_out.weight",
    "decoder.up.2.upsample.conv.weight",
    "decoder.norm_out.weight",
    "post_quant_conv.bias",
)
QUANTIZER_NAMES = ("quantizer._levels", "quantizer._basis", "quantizer.implicit_codebook")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TINY, VIDEO_NAMES),
        (DISCRETE, VIDEO_NAMES + QUANTIZER_NAMES),
        (IMAGE, IMAGE_NAMES),
        (DISCRETE_IMAGE, IMAGE_NAMES + QUANTIZER_NAMES),
    ],
)
def test_reference_names(config: TokenizerConfig, expected: tuple[str, ...]) -> None:
    reference = names.to_reference_names(random_tokenizer(config).state_dict(), config)
    assert set(expected) <= reference.keys()
    # As the published code registers them: the way back has no patch size.
    assert "decoder.unpatcher3d.patch_size_buffer" not in reference


def test_codebook_of_the_reference() -> None:
    codebook = names.reference_buffers(DISCRETE)["quantizer.implicit_codebook"]
    assert codebook.shape == (64_000, 6) and codebook.dtype == torch.bfloat16
    assert codebook[1].tolist() == [-0.75, -1, -1, -1, -1, -1]


def test_what_older_code_never_runs_is_left_out() -> None:
    """The first releases hold all three convolutions of a resampler, also on an axis that keeps its length."""
    config = TokenizerConfig(channels=16, num_res_blocks=1, temporal_compression=4)
    ours = random_tokenizer(config).state_dict()
    dead = names.names_never_run(config)
    assert {name.rsplit(".", 2)[0] for name in dead} == {
        "encoder.down.0.downsample.conv2",  # level 0 halves space, no time
        *(f"encoder.down.1.downsample.conv{number}" for number in (1, 2, 3)),
        *(f"decoder.up.1.upsample.conv{number}" for number in (1, 2, 3)),
        "decoder.up.2.upsample.conv1",  # level 2 doubles space, no time
    }
    assert_same(names.from_reference_names(ours | {name: torch.zeros(1) for name in dead}, config), ours)
    # The first CV4x8x8 has a level less in its decoder, which doubles space and no time.
    of_cv4 = names.names_never_run(PRESETS["CV4x8x8"])
    assert {name for name in of_cv4 if "decoder" in name} == {
        f"decoder.up.1.upsample.conv1.conv3d.{part}" for part in ("weight", "bias")
    }
    with pytest.raises(UserError, match=r"unknown \['encoder.down.2.downsample.conv1.conv3d.weight'\]"):
        names.from_reference_names(ours | {"encoder.down.2.downsample.conv1.conv3d.weight": torch.zeros(1)}, config)


def test_missing_and_unknown_names_are_named() -> None:
    ours = random_tokenizer(TINY).state_dict()
    ours["decoder.surprise"] = ours.pop("encoder.norm_out.norm.bias")
    for translate in (names.to_diffusers_names, names.to_reference_names, names.from_reference_names):
        with pytest.raises(
            UserError, match=r"missing \['encoder.norm_out.norm.bias'\], unknown \['decoder.surprise'\]"
        ):
            translate(ours, TINY)
    with pytest.raises(UserError, match="encoder.conv_in.conv_s.bias"):
        names.from_diffusers_names({}, TINY)


def test_reference_constants_must_agree() -> None:
    reference = names.to_reference_names(random_tokenizer(TINY).state_dict(), TINY)
    reference["encoder.patcher3d.patch_size_buffer"] = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(UserError, match="patch_size_buffer is .2., the config says .4."):
        names.from_reference_names(reference, TINY)
    reference = names.to_reference_names(random_tokenizer(DISCRETE).state_dict(), DISCRETE)
    for levels, message in (((8, 8, 8, 5, 5, 6), "quantizer._levels"), ((8,) * 4, "quantizer")):
        reference["quantizer._levels"] = torch.tensor(levels, dtype=torch.int32)
        with pytest.raises(UserError, match=message):
            names.from_reference_names(reference, DISCRETE)


@pytest.mark.parametrize("config", [TINY, ODD])
def test_diffusers_folder_both_ways(config: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(config)
    conversion.save_diffusers(tokenizer.state_dict(), config, tmp_path / "ours")
    other = AutoencoderKLCosmos.from_pretrained(tmp_path / "ours")
    assert_same(other.state_dict(), names.to_diffusers_names(tokenizer.state_dict(), config))
    other.save_pretrained(tmp_path / "theirs")
    back = conversion.from_diffusers(tmp_path / "theirs")
    assert back.tokenizer_config == config
    assert_same(back.state_dict(), tokenizer.state_dict())


@pytest.mark.parametrize("config", [ODD, DISCRETE, IMAGE])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_reference_file_both_ways(suffix: str, config: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(config).bfloat16()
    path = tmp_path / f"model{suffix}"
    conversion.save_reference(tokenizer.state_dict(), config, path)
    assert_same(names.from_reference_names(published.read_weights(path), config), tokenizer.state_dict())
    with pytest.raises(UserError, match="expected a .pt or .safetensors"):
        conversion.save_reference(tokenizer.state_dict(), config, tmp_path / "model.jit")


def test_foreign_diffusers_models_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    conversion.save_diffusers(random_tokenizer(TINY).state_dict(), TINY, folder)
    good = read_json(folder / "config.json")
    for change, message in (
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"decode_block_out_channels": [8, 8, 8, 8]}, "decode_block_out_channels"),
        ({"decode_block_out_channels": [32, 64, 64, 32]}, "decode_block_out_channels"),
        ({"attention_resolutions": [64]}, "attention_resolutions"),
    ):
        write_json(folder / "config.json", good | change)
        with pytest.raises(UserError, match=message):
            conversion.from_diffusers(folder)


class _Evil:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("pickled code was run",))


def test_pickled_objects_are_not_run(tmp_path: Path) -> None:
    torch.save({"weights": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        published.read_weights(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no such file"),
        ("absent.safetensors", None, "no such file"),
        ("broken.safetensors", b"abc", "not a whole safetensors file"),
        ("broken.pt", b"abc", "not a file of plain tensors"),
    ],
)
def test_bad_reference_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        published.read_weights(tmp_path / name)


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="expected a dict of tensors"):
        published.read_weights(tmp_path / "model.pt")


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="has shape"):
        weights.build(
            TokenizerConfig(channels=8, num_res_blocks=1), random_tokenizer(TINY).state_dict(), dtype=torch.float32
        )
