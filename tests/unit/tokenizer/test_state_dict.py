from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCosmos

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.tokenizer import conversion, weights
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer.config import PRESETS, TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from tests.unit.tokenizer.conftest import ODD, TINY, random_tokenizer


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY, ODD])
def test_every_name_of_diffusers_is_reached(config: TokenizerConfig) -> None:
    values = {k: v for k, v in conversion.diffusers_config(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs, ours = AutoencoderKLCosmos(**values).state_dict(), CausalVideoTokenizer(config).state_dict()
    renamed = names.to_diffusers_names(ours, config)
    assert {name: weight.shape for name, weight in renamed.items()} == {n: w.shape for n, w in theirs.items()}


def test_released_configuration_of_diffusers_is_the_720p_preset() -> None:
    assert conversion.config_of_diffusers({"_class_name": "AutoencoderKLCosmos"}) == PRESETS["CV8x8x8-720p"]


@pytest.mark.parametrize("config", [TINY, ODD])
def test_names_go_there_and_back(config: TokenizerConfig) -> None:
    ours = random_tokenizer(config).state_dict()
    assert_same(names.from_diffusers_names(names.to_diffusers_names(ours, config), config), ours)
    assert_same(names.from_reference_names(names.to_reference_names(ours, config), config), ours)
    assert_same(names.from_reference_names(ours, config), ours)


def test_reference_names() -> None:
    reference = names.to_reference_names(random_tokenizer(TINY).state_dict(), TINY)
    for name in (
        "encoder.patcher3d.wavelets",
        "encoder.patcher3d.patch_size_buffer",
        "decoder.unpatcher3d._arange",
        "encoder.conv_in.0.conv3d.weight",
        "encoder.down.1.block.0.nin_shortcut.conv3d.bias",
        "encoder.down.0.downsample.conv2.conv3d.weight",
        "encoder.mid.attn_1.1.proj_out.conv3d.weight",
        "decoder.up.1.upsample.conv3.conv3d.weight",
        "decoder.norm_out.norm.weight",
        "post_quant_conv.conv3d.bias",
    ):
        assert name in reference


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


@pytest.mark.parametrize("config", [TINY, ODD])
def test_diffusers_folder_both_ways(config: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(config)
    folder = conversion.to_diffusers(tokenizer, tmp_path / "ours")
    other = AutoencoderKLCosmos.from_pretrained(folder)
    assert_same(other.state_dict(), names.to_diffusers_names(tokenizer.state_dict(), config))
    other.save_pretrained(tmp_path / "theirs")
    back = conversion.from_diffusers(tmp_path / "theirs")
    assert back.tokenizer_config == config
    assert_same(back.state_dict(), tokenizer.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_reference_file_both_ways(suffix: str, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(ODD).bfloat16()
    path = conversion.save_reference(tokenizer, tmp_path / f"model{suffix}")
    assert_same(conversion.load_reference(path, ODD, dtype=torch.bfloat16).state_dict(), tokenizer.state_dict())


def test_foreign_diffusers_models_are_refused(tmp_path: Path) -> None:
    folder = conversion.to_diffusers(random_tokenizer(TINY), tmp_path / "vae")
    good = read_json(folder / "config.json")
    for change, message in (
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"decode_block_out_channels": [8, 8, 8, 8]}, "decode_block_out_channels"),
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
        conversion.load_reference(tmp_path / "evil.pt", TINY)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no such file"),
        ("absent.safetensors", None, "no such file"),
        ("model.jit", b"", "expected a .pt or .safetensors"),
        ("broken.safetensors", b"abc", "not a whole safetensors file"),
        ("broken.pt", b"abc", "not a file of plain tensors"),
    ],
)
def test_bad_reference_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        conversion.load_reference(tmp_path / name, TINY)


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="expected a dict of tensors"):
        conversion.load_reference(tmp_path / "model.pt", TINY)


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="has shape"):
        weights.build(
            TokenizerConfig(channels=8, num_res_blocks=1), random_tokenizer(TINY).state_dict(), dtype=torch.float32
        )
