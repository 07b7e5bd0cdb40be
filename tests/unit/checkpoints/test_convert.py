import shutil

import pytest
import torch
from safetensors.torch import save_file

from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.load import load_network, load_tokenizer, read_card
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import architecture_of, config_from
from nemo_cosmos.diffusion.config import diffusion_tiny
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.generation.open import open_world_model
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.tokenizer.weights import read_tensors


def _card(config):
    return CheckpointCard(model="test", config=config, step=3, data="none", command="test")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    config = diffusion_tiny(num_layers=2)
    with initialize():
        model = CosmosDiT(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1, generator=generator)
        state = {name: tensor.detach().clone() for name, tensor in model.global_tensors()}
    save_file(state, path)
    write_json(path.with_suffix(".json"), _card(architecture_of(config)).to_dict())
    return path, state


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    model = CausalVideoTokenizer(TokenizerConfig(channels=8, num_res_blocks=1))
    return weights.save(model, tmp_path_factory.mktemp("tokenizer") / "folder"), model.state_dict()


def _store(path, state, like):
    save_file(state, path)
    shutil.copy(like.with_suffix(".json"), path.with_suffix(".json"))


def _same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_wfm_survives_nemo_and_reference_bit_for_bit(dit, tmp_path):
    path, state = dit
    convert(path, tmp_path / "nemo", to="nemo")
    assert detect(tmp_path / "nemo") is Format.NEMO
    with initialize():
        network, card = load_network(tmp_path / "nemo")
        assert card.step == 3
        assert _same(dict(network.global_tensors()), state)
    convert(tmp_path / "nemo", tmp_path / "back.safetensors", to="safetensors")
    assert _same(read_tensors(tmp_path / "back.safetensors"), state)
    convert(tmp_path / "nemo", tmp_path / "reference.pt", to="reference")
    names = torch.load(tmp_path / "reference.pt", weights_only=True)
    assert "net.blocks.block1.blocks.0.block.attn.to_q.0.weight" in names
    assert torch.equal(names["logvar.1.weight"], state["logvar_head.linear.weight"])


def test_weights_are_cast_only_when_asked(dit, tmp_path):
    path, state = dit
    convert(path, tmp_path / "half.safetensors", to="safetensors", dtype="bfloat16")
    assert _same(read_tensors(tmp_path / "half.safetensors"), {n: t.bfloat16() for n, t in state.items()})
    with pytest.raises(UserError, match="--dtype"):
        convert(path, tmp_path / "a.safetensors", to="safetensors", dtype="int8")


def test_a_wfm_survives_diffusers_but_for_the_uncertainty_head(dit, tmp_path):
    from diffusers import CosmosTransformer3DModel

    path, state = dit
    result = convert(path, tmp_path / "diffusers", to="diffusers")
    assert all(name.startswith("logvar_head") for name in result["dropped"])
    CosmosTransformer3DModel.from_pretrained(tmp_path / "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "back.safetensors", to="safetensors")
    back = read_tensors(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items() if "logvar" not in name)


def test_weights_that_the_source_should_hold_must_be_there(dit, tokenizer, tmp_path):
    path, state = dit
    _store(tmp_path / "wfm.safetensors", {n: t for n, t in state.items() if not n.startswith("blocks.1.mlp")}, path)
    with pytest.raises(UserError, match=r"missing \['blocks\.1\.mlp\.linear_fc1\.weight'"):
        convert(tmp_path / "wfm.safetensors", tmp_path / "nemo", to="nemo")
    _store(tmp_path / "more.safetensors", state | {"another": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unknown \['another'\]"):
        convert(tmp_path / "more.safetensors", tmp_path / "nemo", to="nemo")
    folder, state = tokenizer
    shutil.copytree(folder, tmp_path / "folder")
    save_file({n: t for n, t in state.items() if not n.startswith("decoder.")}, tmp_path / "folder/model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer weights: missing \['decoder\."):
        convert(tmp_path / "folder", tmp_path / "nemo", to="nemo")
    assert not (tmp_path / "nemo").exists()


def test_a_converted_wfm_is_told_its_tokenizer_and_statistics_and_can_be_opened(dit, tokenizer, tmp_path):
    path, _ = dit
    folder, _ = tokenizer
    convert(path, tmp_path / "diffusers", to="diffusers")
    write_json(tmp_path / "s.json", {"latent_mean": [0.5] * 16, "latent_std": [2] * 16})
    facts = {"tokenizer": folder, "statistics": tmp_path / "s.json"}
    convert(tmp_path / "diffusers", tmp_path / "nemo", to="nemo", **facts)
    card = read_card(tmp_path / "nemo")
    assert (card.latent_mean, card.latent_std) == ((0.5,) * 16, (2.0,) * 16)
    with open_world_model(tmp_path / "nemo", folder) as opened:
        assert opened.card == card
    # Another card tells both.
    convert(path, tmp_path / "b.safetensors", to="safetensors", statistics=tmp_path / "nemo" / "card.json")
    again = CheckpointCard.from_dict(read_json(tmp_path / "b.json"))
    assert again.tokenizer_fingerprint == card.tokenizer_fingerprint
    result = convert(tmp_path / "b.safetensors", tmp_path / "c.pt", to="reference")
    assert result["dropped"] == []
    assert CheckpointCard.from_dict(read_json(tmp_path / "c.json")) == again
    result = convert(tmp_path / "b.safetensors", tmp_path / "d", to="diffusers")
    assert result["dropped"][3:] == ["tokenizer_fingerprint", "latent_mean", "latent_std"]
    convert(path, tmp_path / "untold", to="nemo")
    refused = pytest.raises(UserError, match="convert it again with --tokenizer and --statistics")
    with refused, open_world_model(tmp_path / "untold", folder):
        pass


def test_statistics_that_do_not_fit_are_refused(dit, tokenizer, tmp_path):
    path, target = dit[0], tmp_path / "a.safetensors"
    for values in (
        {"latent_mean": [0.0] * 16},
        {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4},
        {"latent_mean": [[0.0]] * 16, "latent_std": [[1.0]] * 16},
        {"latent_mean": [0.0] * 16, "latent_std": [0.0] * 16},
        [0.0],
    ):
        write_json(tmp_path / "s.json", values)
        with pytest.raises(UserError, match=r"s\.json: got .* expected 16 numbers each"):
            convert(path, target, to="safetensors", statistics=tmp_path / "s.json")
    good = {"latent_mean": [0.0] * 16, "latent_std": [1.0] * 16, "tokenizer_fingerprint": "another"}
    write_json(tmp_path / "s.json", good)
    with pytest.raises(UserError, match="latents of tokenizer another, but the tokenizer given is"):
        convert(path, target, to="safetensors", tokenizer=tokenizer[0], statistics=tmp_path / "s.json")
    with pytest.raises(UserError, match="--tokenizer, --statistics: got 'a tokenizer'"):
        convert(tokenizer[0], target, to="safetensors", statistics=tmp_path / "s.json")
    assert not target.exists()


@pytest.mark.parametrize("frames", [1, 16])
def test_a_diffusers_tokenizers_statistics_are_kept(tokenizer, tmp_path, frames):
    convert(tokenizer[0], tmp_path / "diffusers", to="diffusers")
    config = read_json(tmp_path / "diffusers" / "config.json")
    numbers = [0.11362758 + 0.1 * i for i in range(16 * frames)]  # float64, as JSON holds them
    config |= {"latents_mean": numbers, "latents_std": [1 + x for x in numbers]}
    write_json(tmp_path / "diffusers" / "config.json", config)
    assert convert(tmp_path / "diffusers", tmp_path / "nemo", to="nemo")["dropped"] == []
    convert(tmp_path / "nemo", tmp_path / "back", to="diffusers")
    assert read_json(tmp_path / "back" / "config.json") == config
    write_json(tmp_path / "back" / "config.json", config | {"latents_mean": [0.0] * 17})
    with pytest.raises(UserError, match="latents_mean, latents_std: got"):
        convert(tmp_path / "back", tmp_path / "a.safetensors", to="safetensors")


def test_a_wfm_is_normalised_by_its_tokenizers_own_statistics(dit, tokenizer, tmp_path):
    convert(tokenizer[0], tmp_path / "vae", to="diffusers")
    config = read_json(tmp_path / "vae" / "config.json")
    write_json(tmp_path / "vae" / "config.json", config | {"latents_mean": [0.5] * 64, "latents_std": [2.0] * 64})
    convert(dit[0], tmp_path / "nemo", to="nemo", tokenizer=tmp_path / "vae")
    card = read_card(tmp_path / "nemo")
    assert (card.latent_mean, card.latent_std) == ((0.5,) * 64, (2.0,) * 64)
    assert card.tokenizer_fingerprint == load_tokenizer(tmp_path / "vae").model.fingerprint()
    write_json(tmp_path / "s.json", {"latent_mean": [0.25] * 16, "latent_std": [1.5] * 16})
    convert(dit[0], tmp_path / "nemo", to="nemo", tokenizer=tmp_path / "vae", statistics=tmp_path / "s.json")
    assert read_card(tmp_path / "nemo").latent_mean == (0.25,) * 16


def test_diffusers_weights_may_lack_the_uncertainty_head(dit, tmp_path):
    path, state = dit
    convert(path, tmp_path / "diffusers", to="diffusers")
    added = convert(tmp_path / "diffusers", tmp_path / "nemo", to="nemo")["added"]
    with initialize():
        network = load_network(tmp_path / "nemo")[0]
        found, fresh = dict(network.global_tensors()), dict(CosmosDiT(network.config).global_tensors())
    assert sorted(added) == sorted(name for name in state if "logvar" in name)
    assert all(torch.equal(found[name], fresh[name]) for name in added)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items() if "logvar" not in name)


def test_a_tokenizer_survives_every_format(tokenizer, tmp_path):
    from diffusers import AutoencoderKLCosmos

    folder, state = tokenizer
    convert(folder, tmp_path / "diffusers", to="diffusers")
    AutoencoderKLCosmos.from_pretrained(tmp_path / "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "nemo", to="nemo")
    assert _same(load_tokenizer(tmp_path / "nemo").model.state_dict(), state)
    convert(tmp_path / "nemo", tmp_path / "reference.safetensors", to="reference")
    assert set(state) <= set(read_tensors(tmp_path / "reference.safetensors"))


def test_reference_weights_need_a_preset(tokenizer, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="--preset.*diffusion_7b"):
        convert(tmp_path / "a.pt", tmp_path / "b", to="nemo")
    with pytest.raises(UserError, match="missing"):
        convert(tmp_path / "a.pt", tmp_path / "b", to="nemo", preset="CV8x8x8-tiny")


def test_bad_places_and_formats_are_refused(dit, tmp_path):
    path, _ = dit
    with pytest.raises(UserError, match="--to"):
        convert(path, tmp_path / "a", to="onnx")
    with pytest.raises(UserError, match="neither a folder nor embedded"):
        convert("nowhere", tmp_path / "a", to="nemo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is none of"):
        convert(tmp_path / "empty", tmp_path / "a", to="nemo")
    with pytest.raises(UserError, match=r"\.pt or \.safetensors"):
        convert(path, tmp_path / "folder", to="reference")


def test_an_architecture_survives_json(dit):
    config = diffusion_tiny(action_dim=7, extra_pos_embed="learnable")
    assert architecture_of(config_from(architecture_of(config))) == architecture_of(config)
    with pytest.raises(UserError, match="missing \\['num_layers'\\]"):
        config_from({n: v for n, v in architecture_of(config).items() if n != "num_layers"})
