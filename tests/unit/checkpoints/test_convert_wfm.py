"""Diffusion WFMs among the reference's `.pt`, NeMo checkpoints and diffusers folders, bit for bit."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed import checkpoint as torch_checkpoint

from nemo_cosmos.checkpoints import convert_wfm
from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.load import read_card
from nemo_cosmos.checkpoints.wfm import open_wfm
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import architecture_of
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import NOT_IN_DIFFUSERS
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer import conversion
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.weight_files.safetensors_files import write_safetensors
from nemo_cosmos.weight_files.stored_tensor import read_all, stored
from nemo_cosmos.weight_files.torch_files import write_pt
from tests.unit.weight_files.test_safetensors_files import assert_same

PLACES = {"reference": "model.pt", "nemo": "nemo", "diffusers": "diffusers"}


def config_for(**overrides: object) -> DiTConfig:
    sizes = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "adaln_lora_dim": 8, "backend": "torch"}
    return DiTConfig(**{**sizes, "crossattn_emb_channels": 12, "max_latent_size": (4, 16, 12), **overrides})


def write_wfm(path: Path, config: DiTConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Writes random weights under our names with their card; returns them."""
    generator = torch.Generator().manual_seed(0)
    with initialize(), torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CosmosDiT(config).global_tensors()}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    write_safetensors(path, stored(state))
    card = CheckpointCard(model="test", config=architecture_of(config), step=3, data="none", command="test")
    write_json(path.with_suffix(".json"), card.to_dict())
    return state


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def wfm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A WFM with a condition mask in all three formats, and its weights."""
    folder = tmp_path_factory.mktemp("wfm")
    state = write_wfm(folder / "ours.safetensors", config_for(concat_condition_mask=True), request.param)
    for to, name in PLACES.items():
        convert(folder / "ours.safetensors", folder / name, to=to)
    return folder, state


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PLACES, 2)))
def test_every_way_there_and_back_is_exact(wfm: tuple[Path, dict], tmp_path: Path, first: str, second: str) -> None:
    folder, state = wfm
    there = convert(folder / PLACES[first], tmp_path / PLACES[second], to=second)
    back = tmp_path / f"back_{PLACES[first]}"
    again = convert(tmp_path / PLACES[second], back, to=first)
    if "diffusers" in (first, second):
        lost, gained = (there, again) if second == "diffusers" else (again, there)
        assert set(NOT_IN_DIFFUSERS) <= set(lost["dropped"])
        assert set(gained["added"]) == set(NOT_IN_DIFFUSERS)
        state = {name: weight for name, weight in state.items() if name not in NOT_IN_DIFFUSERS}
    else:
        assert there["dropped"] == again["dropped"] == there["added"] == again["added"] == []
    found = read_all(open_wfm(back).weights)
    assert_same({name: found[name] for name in state}, state)


def test_the_reference_file_is_what_the_published_code_loads(wfm: tuple[Path, dict]) -> None:
    folder, state = wfm
    reference = torch.load(folder / "model.pt", weights_only=True)
    assert torch.equal(reference["logvar.1.weight"], state["logvar_head.linear.weight"])
    fused = state["blocks.1.self_attention.linear_qkv.weight"]
    query = reference["net.blocks.block1.blocks.0.block.attn.to_q.0.weight"]
    assert torch.equal(query[24:], fused[72:96])  # the second head's rows


def test_the_diffusers_folder_is_what_diffusers_loads(wfm: tuple[Path, dict]) -> None:
    from diffusers import CosmosTransformer3DModel

    folder, state = wfm
    model, told = CosmosTransformer3DModel.from_pretrained(
        folder / "diffusers", torch_dtype=state["x_embedder.proj.weight"].dtype, output_loading_info=True
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.state_dict()["proj_out.weight"], state["final_layer.linear.weight"])


def test_the_nemo_checkpoint_is_what_megatron_writes(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, state = wfm
    with initialize():
        network = CosmosDiT(config_for(concat_condition_mask=True))
        network.load_state_dict(state, strict=False)
        (tmp_path / "theirs").mkdir()
        dist_checkpointing.save({"state_dict": network.sharded_state_dict(prefix="module.")}, str(tmp_path / "theirs"))
        ours, theirs = (
            torch_checkpoint.FileSystemReader(path).read_metadata()
            for path in (folder / "nemo" / "weights", tmp_path / "theirs")
        )
        assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
        for name, entry in theirs.state_dict_metadata.items():
            assert getattr(ours.state_dict_metadata[name], "size", None) == getattr(entry, "size", None)
        assert read_json(folder / "nemo/weights/metadata.json") == read_json(tmp_path / "theirs/metadata.json")
        # Megatron's own load takes it, objects included, and turns it into the network's type.
        blank = CosmosDiT(config_for(concat_condition_mask=True, init_seed=7))
        loaded = dist_checkpointing.load(
            {"state_dict": blank.sharded_state_dict(prefix="module.")}, str(folder / "nemo" / "weights")
        )
        for name, weight in loaded["state_dict"].items():
            if isinstance(weight, torch.Tensor):
                assert torch.equal(weight, state[name.removeprefix("module.")].to(weight.dtype))


def test_action_weights_go_through_reference_and_nemo_and_diffusers_says_no(tmp_path: Path) -> None:
    config = config_for(concat_condition_mask=True, action_dim=7)
    state = write_wfm(tmp_path / "ours.safetensors", config, torch.float32)
    convert(tmp_path / "ours.safetensors", tmp_path / "model.pt", to="reference")
    assert "net.action_embedder_B_3D.fc2.bias" in torch.load(tmp_path / "model.pt", weights_only=True)
    convert(tmp_path / "model.pt", tmp_path / "nemo", to="nemo")
    assert_same(read_all(open_wfm(tmp_path / "nemo").weights), state)
    with pytest.raises(UserError, match="diffusers has no action layers"):
        convert(tmp_path / "nemo", tmp_path / "diffusers", to="diffusers")


def test_the_card_goes_along(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = wfm
    convert(folder / "model.pt", tmp_path / "nemo", to="nemo")
    assert read_card(tmp_path / "nemo") == CheckpointCard.from_dict(read_json(folder / "ours.json"))


def published(folder: Path, wfm: tuple[Path, dict], **more: object) -> Path:
    """A file as post-training leaves it, without a card."""
    reference = torch.load(wfm[0] / "model.pt", weights_only=True)
    torch.save({**reference, **more}, folder / "model.pt")
    return folder / "model.pt"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A preset of the test's size."""
    from nemo_cosmos.diffusion import config

    monkeypatch.setitem(config.PRESETS, "small", lambda **variants: config_for(**variants))
    yield "small"


def test_a_published_folder_is_read_by_preset(wfm: tuple[Path, dict], tmp_path: Path, named: str) -> None:
    extra = "net.blocks.block0.blocks.0.block.attn.to_q.1._extra_state"
    (tmp_path / "Cosmos").mkdir()
    published(tmp_path / "Cosmos", wfm, **{extra: io.BytesIO(b"fp8 scales")})
    convert(tmp_path / "Cosmos", tmp_path / "nemo", to="nemo", preset=named)
    assert_same(read_all(open_wfm(tmp_path / "nemo").weights), wfm[1])
    with pytest.raises(UserError, match="expected the shapes of diffusion_7b or diffusion_14b"):
        convert(tmp_path / "Cosmos", tmp_path / "nemo", to="nemo")


def test_unknown_missing_and_misshapen_weights_are_named(wfm: tuple[Path, dict], tmp_path: Path, named: str) -> None:
    file = published(tmp_path, wfm, **{"net.view_embeddings.weight": torch.zeros(6, 6)})
    with pytest.raises(UserError, match=r"1 unknown \['net\.view_embeddings\.weight'\]"):
        convert(file, tmp_path / "nemo", to="nemo", preset=named)
    weights = torch.load(file, weights_only=True)
    del weights["net.view_embeddings.weight"], weights["logvar.1.weight"]
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"1 weights missing \['logvar\.1\.weight'\]"):
        convert(file, tmp_path / "nemo", to="nemo", preset=named)
    weights["logvar.1.weight"] = torch.zeros(1, 64)
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"weight logvar_head\.linear\.weight: got \[1, 64\], expected \[1, 128\]"):
        convert(file, tmp_path / "nemo", to="nemo", preset=named)
    assert not (tmp_path / "nemo").exists()


def test_pickled_code_in_a_published_file_is_refused(tmp_path: Path) -> None:
    torch.save({"net.x_embedder.proj.1.weight": torch.zeros(1), "harm": print}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="Pickled objects are not run"):
        convert(tmp_path / "model.pt", tmp_path / "nemo", to="nemo")


def test_a_card_of_another_size_is_refused(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = wfm
    card = read_json(folder / "ours.json")
    write_pt(tmp_path / "model.pt", stored(torch.load(folder / "model.pt", weights_only=True)))
    write_json(tmp_path / "model.json", {**card, "config": {**card["config"], "ffn_hidden_size": 100}})
    with pytest.raises(UserError, match=r"mlp\.linear_fc1\.weight: got \[192, 48\], expected \[100, 48\]"):
        convert(tmp_path / "model.pt", tmp_path / "nemo", to="nemo")


def test_a_large_diffusers_folder_is_cut_and_replaced_whole(
    wfm: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = wfm
    monkeypatch.setattr(convert_wfm, "MAX_SHARD_SIZE", "100KB")
    convert(folder / "model.pt", tmp_path / "diffusers", to="diffusers")
    assert len(list((tmp_path / "diffusers").glob("diffusion_pytorch_model-*.safetensors"))) > 1
    found = read_all(open_wfm(tmp_path / "diffusers").weights)
    assert_same(found, {name: weight for name, weight in state.items() if name not in NOT_IN_DIFFUSERS})
    monkeypatch.setattr(convert_wfm, "MAX_SHARD_SIZE", "5GB")
    convert(folder / "model.pt", tmp_path / "diffusers", to="diffusers")
    assert len(list((tmp_path / "diffusers").glob("diffusion_pytorch_model*"))) == 1


def test_a_pipeline_tells_its_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_wfm(tmp_path / "ours.safetensors", config_for(), torch.float32)
    tokenizer = CausalVideoTokenizer(TokenizerConfig(channels=8, num_res_blocks=1))
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    write_json(pipeline / "model_index.json", {"_class_name": "CosmosTextToWorldPipeline"})
    convert(tmp_path / "ours.safetensors", pipeline / "transformer", to="diffusers")
    conversion.save_diffusers(tokenizer.state_dict(), tokenizer.tokenizer_config, pipeline / "vae")
    convert(pipeline, tmp_path / "nemo", to="nemo")
    card = read_card(tmp_path / "nemo")
    assert card.tokenizer_fingerprint == tokenizer.fingerprint()
    # Without statistics the pipeline leaves latents as they are.
    assert (card.latent_mean, card.latent_std) == ((0.0,) * 16, (1.0,) * 16)
    values = read_json(pipeline / "vae" / "config.json")
    write_json(pipeline / "vae" / "config.json", {**values, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16})
    convert(pipeline, tmp_path / "nemo", to="nemo")
    assert read_card(tmp_path / "nemo").latent_std == (2.0,) * 16


def test_wfms_become_no_programs(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to: got 'onnx'"):
        convert(wfm[0] / "model.pt", tmp_path / "a", to="onnx")
