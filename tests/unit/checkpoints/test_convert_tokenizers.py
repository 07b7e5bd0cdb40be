"""Tokenizers of all four families among the published layout, NeMo checkpoints, diffusers folders and our files."""

import shutil
from pathlib import Path

import pytest
import torch

from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import embedded_path
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import PRESETS, TokenizerConfig
from nemo_cosmos.tokenizer.model import build_tokenizer
from nemo_cosmos.tokenizer.weights import read_tensors, write_tensors
from tests.unit.tokenizer.conftest import random_tokenizer
from tests.unit.tokenizer.test_published import FAMILIES, VIDEO, write_published


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=FAMILIES, ids=lambda config: config.family)
def config(request: pytest.FixtureRequest) -> TokenizerConfig:
    return request.param


def test_a_published_tokenizer_goes_through_nemo_and_back(config: TokenizerConfig, tmp_path: Path) -> None:
    ours = random_tokenizer(config).state_dict()
    folder = write_published(tmp_path / "published", names.to_reference_names(ours, config))
    write_json(folder / "config.json", config.to_dict())
    assert detect(folder) is Format.PUBLISHED
    assert_same(load_tokenizer(folder).model.state_dict(), ours)
    convert(folder, tmp_path / "nemo", to="nemo")
    assert_same(load_tokenizer(tmp_path / "nemo").model.state_dict(), ours)
    convert(tmp_path / "nemo", tmp_path / "a.safetensors", to="safetensors")
    assert_same(read_tensors(tmp_path / "a.safetensors"), ours)
    convert(tmp_path / "a.safetensors", tmp_path / "ours", to="folder")
    assert detect(tmp_path / "ours") is Format.FOLDER
    assert_same(load_tokenizer(tmp_path / "ours").model.state_dict(), ours)
    convert(tmp_path / "a.safetensors", tmp_path / "model.pt", to="reference")
    assert_same(torch.load(tmp_path / "model.pt", weights_only=True), names.to_reference_names(ours, config))


def test_half_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(VIDEO).bfloat16()
    weights.save(tokenizer, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "exported", to="torchscript")
    convert(tmp_path / "exported", tmp_path / "a.safetensors", to="safetensors")
    assert_same(read_tensors(tmp_path / "a.safetensors"), tokenizer.state_dict())
    convert(tmp_path / "exported", tmp_path / "nemo", to="nemo")
    convert(tmp_path / "nemo", tmp_path / "b.safetensors", to="safetensors")
    assert_same(read_tensors(tmp_path / "b.safetensors"), tokenizer.state_dict())


def test_a_published_tokenizer_and_its_statistics_go_round_bit_for_bit(tmp_path: Path) -> None:
    """published -> NeMo -> diffusers -> published; diffusers has no place for those of pictures."""
    ours = random_tokenizer(VIDEO).state_dict()
    folder = write_published(tmp_path / "published", names.to_reference_names(ours, VIDEO))
    write_json(folder / "config.json", VIDEO.to_dict())
    generator = torch.Generator().manual_seed(0)
    of_videos, of_pictures = (torch.rand(2, 4, n, generator=generator) + 0.1 for n in (16, 1))
    torch.save(tuple(of_videos), folder / "mean_std.pt")
    torch.save(tuple(of_pictures[..., 0]), folder / "image_mean_std.pt")
    statistics = load_tokenizer(folder).statistics
    assert convert(folder, tmp_path / "nemo", to="nemo")["dropped"] == []
    assert load_tokenizer(tmp_path / "nemo").statistics == statistics
    assert convert(tmp_path / "nemo", tmp_path / "exported", to="torchscript")["dropped"] == []
    saved = [torch.load(tmp_path / "exported" / n, weights_only=True) for n in ("mean_std.pt", "image_mean_std.pt")]
    assert all(map(torch.equal, saved[0], of_videos))
    assert all(map(torch.equal, saved[1], of_pictures))
    dropped = convert(tmp_path / "nemo", tmp_path / "diffusers", to="diffusers")["dropped"]
    assert dropped == ["image_latent_mean", "image_latent_std"]
    assert read_json(tmp_path / "diffusers" / "config.json")["latents_std"] == of_videos[1].flatten().tolist()
    found = load_tokenizer(tmp_path / "diffusers")
    assert found.statistics.of(16) == statistics.of(16)
    convert(tmp_path / "diffusers", tmp_path / "a.safetensors", to="safetensors")
    assert load_tokenizer(tmp_path / "a.safetensors").statistics == found.statistics
    assert_same(read_tensors(tmp_path / "a.safetensors"), ours)
    dropped = convert(tmp_path / "nemo", tmp_path / "model.pt", to="reference")["dropped"]
    assert dropped == ["latent_mean", "latent_std", "image_latent_mean", "image_latent_std"]


def test_statistics_beside_other_files_are_not_a_conversions_own(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    torch.save((torch.zeros(4), torch.ones(4)), tmp_path / "mine" / "mean_std.pt")
    with pytest.raises(UserError, match="Give another target, or delete this one"):
        convert(small, tmp_path / "mine", to="diffusers")
    for name in ("encoder.jit", "decoder.jit", "autoencoder.jit", "config.json"):
        (tmp_path / "mine" / name).touch()
    convert(small, tmp_path / "mine", to="diffusers")
    assert detect(tmp_path / "mine") is Format.DIFFUSERS


def test_the_preset_is_told_by_the_folder_or_by_a_published_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = build_tokenizer(PRESETS["DI8x8"]).bfloat16()
    tensors = {name: torch.zeros_like(weight, device="cpu") for name, weight in network.state_dict().items()}
    place = tmp_path / "Cosmos-0.1-Tokenizer-DI8x8"
    place.mkdir()
    torch.save(tensors, place / "model.pt")
    convert(place, tmp_path / "a.safetensors", to="safetensors")
    card = CheckpointCard.from_dict(read_json(tmp_path / "a.json"))
    assert TokenizerConfig.from_dict(card.config) == PRESETS["DI8x8"]
    shutil.move(place, tmp_path / "mine")
    with pytest.raises(UserError, match="--preset: got None, expected one of .*Cosmos-Tokenize1-DI8x8-360p"):
        convert(tmp_path / "mine", tmp_path / "b.safetensors", to="safetensors")
    for preset in ("DI8x8", "Cosmos-Tokenizer-DI8x8", "nvidia/Cosmos-Tokenizer-DI8x8"):
        convert(tmp_path / "mine", tmp_path / "b.safetensors", to="safetensors", preset=preset)
        assert read_json(tmp_path / "b.json")["config"] == card.config
    with pytest.raises(UserError, match="missing .*encoder"):
        convert(tmp_path / "mine", tmp_path / "c.safetensors", to="safetensors", preset="DI16x16")


def test_one_file_of_an_archive_is_read_and_must_be_whole(tmp_path: Path) -> None:
    ours = random_tokenizer(VIDEO).state_dict()
    folder = write_published(tmp_path / "published", names.to_reference_names(ours, VIDEO))
    write_json(folder / "config.json", VIDEO.to_dict())
    with pytest.raises(UserError, match=r"missing \['decoder\.conv_in"):
        convert(folder / "encoder.jit", tmp_path / "a.safetensors", to="safetensors")
    shutil.rmtree(folder)
    write_published(folder, ours | {"encoder.extra": torch.zeros(1)})
    write_json(folder / "config.json", VIDEO.to_dict())
    with pytest.raises(UserError, match=r"unknown \['encoder\.extra'\]"):
        convert(folder, tmp_path / "a.safetensors", to="safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small tokenizer as a file with its card."""
    folder = weights.save(random_tokenizer(VIDEO), tmp_path / "small")
    convert(folder, tmp_path / "files" / "small.safetensors", to="safetensors")
    return tmp_path / "files" / "small.safetensors"


def test_a_target_that_holds_anything_else_stays(small: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    convert(small, mine, to="diffusers")  # empty
    convert(small, mine, to="diffusers")  # its own
    convert(small, mine, to="torchscript")
    (mine / "thesis.tex").write_text("all of it")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "weights").mkdir()
    (tmp_path / "notes" / "card.json").touch()
    for folder in (mine, tmp_path / "notes"):
        before = sorted(folder.iterdir())
        for to in ("diffusers", "nemo", "torchscript"):
            with pytest.raises(UserError, match=rf"target: got '{folder}'.* Give another target, or delete this one"):
                convert(small, folder, to=to)
        assert sorted(folder.iterdir()) == before
    (tmp_path / "a.safetensors").mkdir()
    for target, to in ((tmp_path / "a.safetensors", "safetensors"), (small.with_suffix(".json"), "nemo")):
        with pytest.raises(UserError, match="Give another target, or delete this one"):
            convert(small, target, to=to)
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        convert(small, tmp_path / "a.json", to="safetensors")


def test_the_source_is_never_replaced(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "vae", to="diffusers")
    (tmp_path / "link").symlink_to("vae")
    for target in (tmp_path / "vae", tmp_path / "vae" / "below", tmp_path / "link", tmp_path):
        with pytest.raises(UserError, match="a place apart from the source"):
            convert(tmp_path / "vae", target, to="diffusers")
    with pytest.raises(UserError, match="a place apart from the source"):
        convert(small, small, to="safetensors", dtype="bfloat16")
    assert {tensor.dtype for tensor in read_tensors(small).values()} == {torch.float32}
    assert (tmp_path / "vae" / "config.json").exists()


def test_a_file_with_its_card_is_loaded(small: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(small)
    assert loaded.name == "small"
    assert_same(loaded.model.state_dict(), read_tensors(small))
    assert_same(weights.load(small).state_dict(), read_tensors(small))
    small.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="Convert it first"):
        load_tokenizer(small)


def test_a_wfm_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusion_tiny_action.*is a diffusion WFM, expected a tokenizer"):
        load_tokenizer("diffusion_tiny_action")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "metadata.json").touch()
    shutil.copy(embedded_path("diffusion_tiny_action").with_suffix(".json"), tmp_path / "card.json")
    with pytest.raises(UserError, match="is a diffusion WFM, expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_diffusers_tokenizer_in_several_files_is_loaded(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    convert(small, folder, to="diffusers")
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(whole)
    whole.unlink()
    placed = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(placed.values()):
        write_tensors(folder / file, {name: tensors[name] for name in tensors if placed[name] == file})
    write_json(folder / f"{whole.name}.index.json", {"weight_map": placed})
    assert_same(load_tokenizer(folder).model.state_dict(), read_tensors(small))


def test_a_kill_leaves_no_weights_with_an_old_card(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.safetensors"
    convert(small, target, to="safetensors")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_cosmos.checkpoints.convert.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(small, target, to="safetensors", dtype="bfloat16")
    assert not target.with_suffix(".json").exists()
