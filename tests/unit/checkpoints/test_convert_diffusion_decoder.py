"""Diffusion decoders among the reference's `.pt`, NeMo checkpoints and safetensors, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nemo_cosmos.autoregressive.diffusion_decoder import state_dict as names
from nemo_cosmos.autoregressive.diffusion_decoder.architecture import architecture_of
from nemo_cosmos.autoregressive.diffusion_decoder.config import diffusion_decoder_7b, diffusion_decoder_tiny
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.autoregressive.diffusion_decoder.published import config_of_reference, is_reference
from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.diffusion_decoder import find_diffusion_decoder
from nemo_cosmos.checkpoints.wfm import is_wfm
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.weight_files.safetensors_files import write_safetensors
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, read_all, stored

PLACES = {"reference": "model.pt", "nemo": "nemo", "safetensors": "ours.safetensors"}
CONFIG = diffusion_decoder_tiny(num_layers=1, token_vocab_size=64, init_token_levels=None, backend="torch")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A decoder in all formats, and its weights."""
    folder = tmp_path_factory.mktemp("decoder")
    with initialize():
        network = DiffusionDecoderDiT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(t.shape, generator=generator).bfloat16() for n, t in network.global_tensors()}
    write_safetensors(folder / "ours.safetensors", stored(state))
    card = CheckpointCard(
        model="test", config=architecture_of(CONFIG), step=3, data="none", command="test", token_fingerprint="abc"
    )
    write_json(folder / "ours.json", card.to_dict())
    for to in ("reference", "nemo"):
        report = convert(folder / "ours.safetensors", folder / PLACES[to], to=to)
        assert (report["kind"], report["weights"], report["dropped"]) == ("diffusion_decoder", len(state), [])
    return folder, state


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PLACES, 2)))
def test_every_way_there_and_back_is_exact(decoder: tuple[Path, dict], tmp_path: Path, first: str, second: str) -> None:
    folder, state = decoder
    convert(folder / PLACES[first], tmp_path / PLACES[second], to=second)
    back = tmp_path / f"back_{PLACES[first]}"
    convert(tmp_path / PLACES[second], back, to=first)
    found = find_diffusion_decoder(back)
    weights = read_all(found.model.weights)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert found.card.config == architecture_of(CONFIG)
    assert (found.card.step, found.card.token_fingerprint) == (3, "abc")
    assert not is_wfm(back, None)


def test_a_decoder_loads_into_its_network(decoder: tuple[Path, dict]) -> None:
    folder, state = decoder
    with initialize():
        network = find_diffusion_decoder(folder / "nemo").load(backend="torch")
    for name, tensor in network.global_tensors():
        assert torch.equal(tensor, state[name].float()), name


def test_the_published_decoder_is_told_by_its_names_and_shapes() -> None:
    """Names and shapes as `DiffusionDecoderGeneralDIT` of cosmos-predict1 has them; it has no learnable positions."""
    config = diffusion_decoder_7b(backend="torch")
    with initialize(), torch.device("meta"):
        ours = dict(DiffusionDecoderDiT(config).global_tensors())
    reference = names.leaving({n: StoredTensor.of(tensor) for n, tensor in ours.items()}, config)
    assert reference["net.token_embedder.weight"].shape == (64_000, 32)
    assert reference["net.x_embedder.proj.1.weight"].shape == (4096, 196)
    assert is_reference(reference)
    found = config_of_reference(reference)
    assert architecture_of(found) == architecture_of(config)
    assert names.entering(reference, found).keys() == ours.keys()
    with pytest.raises(UserError, match="the shapes of diffusion_decoder_tiny"):
        config_of_reference(reference, "diffusion_decoder_tiny")


def test_what_is_no_decoder_is_refused(decoder: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusion_tiny_text2world: is no diffusion decoder"):
        find_diffusion_decoder("diffusion_tiny_text2world")
    with pytest.raises(UserError, match="--to: got 'diffusers'"):
        convert(decoder[0] / "nemo", tmp_path / "out", to="diffusers")
    with pytest.raises(UserError, match="net.token_embedder.weight is missing"):
        names.entering({}, CONFIG)
