"""Autoregressive WFMs among the reference's `.pt` and NeMo checkpoints, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nemo_cosmos.autoregressive.architecture import architecture_of
from nemo_cosmos.autoregressive.config import ARConfig, Yarn
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.checkpoints.autoregressive import AUTOREGRESSIVE
from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.wfm import is_wfm
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.training.load import load_weights
from nemo_cosmos.weight_files.safetensors_files import write_safetensors
from nemo_cosmos.weight_files.stored_tensor import read_all, stored
from tests.unit.autoregressive.test_model import WITH_TEXT, config_for
from tests.unit.autoregressive.test_state_dict import assert_same, cut, random_state, with_fused_qkv

PLACES = {"reference": "model.pt", "nemo": "nemo", "safetensors": "ours.safetensors"}


def config() -> ARConfig:
    return config_for(**WITH_TEXT, yarn=Yarn())


@pytest.fixture(scope="module")
def wfm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A WFM in all formats, and its weights."""
    folder = tmp_path_factory.mktemp("wfm")
    with initialize():
        state = {name: weight.bfloat16() for name, weight in random_state(config()).items()}
    write_safetensors(folder / "ours.safetensors", stored(state))
    card = CheckpointCard(model="test", config=architecture_of(config()), step=3, data="none", command="test")
    write_json(folder / "ours.json", card.to_dict())
    for to in ("reference", "nemo"):
        report = convert(folder / "ours.safetensors", folder / PLACES[to], to=to)
        assert (report["kind"], report["weights"], report["dropped"]) == ("autoregressive", len(state), [])
    return folder, state


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PLACES, 2)))
def test_every_way_there_and_back_is_exact(wfm: tuple[Path, dict], tmp_path: Path, first: str, second: str) -> None:
    folder, state = wfm
    convert(folder / PLACES[first], tmp_path / PLACES[second], to=second)
    back = tmp_path / f"back_{PLACES[first]}"
    convert(tmp_path / PLACES[second], back, to=first)
    found = AUTOREGRESSIVE.open(back)
    assert_same(read_all(found.weights), state)
    assert found.card.config == architecture_of(config()) and found.card.step == 3


def test_a_nemo_checkpoint_loads_into_the_model(wfm: tuple[Path, dict]) -> None:
    folder, state = wfm
    with initialize():
        model = CosmosAR(config())
        load_weights(model, folder / "nemo")
        assert_same(dict(model.named_parameters()), {name: weight.float() for name, weight in state.items()})


@pytest.mark.parametrize("fused", [False, True])
def test_files_cut_over_ranks_are_merged(wfm: tuple[Path, dict], tmp_path: Path, fused: bool) -> None:
    folder, state = wfm
    shards = cut(torch.load(folder / "model.pt", weights_only=True), 2)
    for rank, shard in enumerate(shards):
        # As a training of the published code saves it.
        torch.save({"model": with_fused_qkv(shard) if fused else shard}, tmp_path / f"iter_000000100_mp_{rank}.pt")
    card = (folder / "model.json").read_text()
    (tmp_path / "iter_000000100_mp_1.json").write_text(card)
    convert(tmp_path / "iter_000000100_mp_1.pt", tmp_path / "whole.safetensors", to="safetensors")
    assert_same(read_all(AUTOREGRESSIVE.open(tmp_path / "whole.safetensors").weights), state)


def test_casting_and_the_tokenizers_fingerprint(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, state = wfm
    convert(
        folder / "nemo", tmp_path / "wide.safetensors", to="safetensors", dtype="float32", tokenizer="tokenizer_tiny"
    )
    found = AUTOREGRESSIVE.open(tmp_path / "wide.safetensors")
    assert_same(read_all(found.weights), {name: weight.float() for name, weight in state.items()})
    assert len(found.card.tokenizer_fingerprint) == 64


def test_it_is_no_diffusion_wfm(wfm: tuple[Path, dict]) -> None:
    folder, _ = wfm
    assert not any(is_wfm(folder / place, None) for place in PLACES.values())
    for preset in ("autoregressive_tiny", "autoregressive_4b", "diffusion_7b"):  # what the user says goes first
        assert AUTOREGRESSIVE.lies_at(folder / "model.pt", preset) is preset.startswith("autoregressive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "diffusers"}, r"--to: got 'diffusers', expected one of \('nemo', 'reference', 'safetensors'\)"),
        ({"to": "nemo", "statistics": "cache.json"}, "--statistics: got 'cache.json', expected none"),
        ({"to": "nemo", "preset": "autoregressive_4b"}, "expected the shapes of autoregressive_4b"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    wfm: tuple[Path, dict], tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        convert(wfm[0] / "model.pt", tmp_path / "new", **arguments)


def test_weights_of_another_shape_are_named(wfm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, state = wfm
    narrow = {**state, "output_layer.weight": state["output_layer.weight"][:, :64]}
    write_safetensors(tmp_path / "narrow.safetensors", stored(narrow))
    (tmp_path / "narrow.json").write_text((folder / "ours.json").read_text())
    with pytest.raises(UserError, match=r"weight output_layer.weight: got \[64, 64\], expected \[64, 72\], as its"):
        convert(tmp_path / "narrow.safetensors", tmp_path / "new", to="nemo")
