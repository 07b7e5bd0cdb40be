"""One table of names: complete, strict, exact to the bit; fused and cut weights of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.shards import merge_shards, shard_files
from nemo_cosmos.autoregressive.state_dict import from_reference, to_reference
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.stored_tensor import read_all, stored
from tests.unit.autoregressive.test_model import WITH_TEXT, config_for

CUT_BY_ROWS = ("tok_embeddings", "output", ".wq", ".wk", ".wv", ".w1", ".w3")
CUT_BY_COLUMNS = (".wo", ".w2")


def random_state(config: ARConfig) -> dict[str, torch.Tensor]:
    """Distinct values in every weight."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CosmosAR(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_fused_qkv(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the published code saves it with `fuse_qkv`; cross-attention it never fuses."""
    fused = dict(reference)
    for name in [name for name in reference if name.endswith(".attention.wq.weight")]:
        parts = [fused.pop(name.replace("wq", which)) for which in ("wq", "wk", "wv")]
        fused[name.replace("wq", "wqkv")] = torch.cat(parts)
    return fused


def cut(reference: dict[str, torch.Tensor], num_ranks: int) -> list[dict[str, torch.Tensor]]:
    """As the published code cuts it over tensor-parallel ranks."""

    def part(name: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if layer.endswith(CUT_BY_ROWS):
            return weight.chunk(num_ranks, dim=0)[rank].clone()
        return weight.chunk(num_ranks, dim=1)[rank].clone() if layer.endswith(CUT_BY_COLUMNS) else weight

    return [{name: part(name, weight, rank) for name, weight in reference.items()} for rank in range(num_ranks)]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "overrides",
    [
        WITH_TEXT,
        {**WITH_TEXT, "action_dim": 7},
        {"share_embeddings_and_output_weights": True},
        {"num_query_groups": 4},
    ],
)
def test_round_trips_are_exact(overrides: dict, one_rank: torch.device) -> None:
    config = config_for(**overrides)
    state = random_state(config)
    reference = to_reference(state, config)
    assert_same(from_reference(reference, config), state)
    assert_same(from_reference(with_fused_qkv(reference), config), state)
    bare = {name.removeprefix("model."): weight for name, weight in reference.items()}
    bare["layers.0.attention._extra_state"] = torch.zeros(1)
    assert_same(from_reference(bare, config), state)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_cut_over_ranks_are_merged(fused: bool, one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT)
    state = random_state(config)
    shards = cut(to_reference(state, config), 2)
    shards = [with_fused_qkv(shard) for shard in shards] if fused else shards
    merged = read_all(merge_shards([stored(shard) for shard in shards]))
    assert_same(from_reference(merged, config), state)
    # Where ranks drifted apart, the mean.
    shards[1]["model.norm.weight"] = shards[0]["model.norm.weight"] + 0.5
    drifted = read_all(merge_shards([stored(shard) for shard in shards]))
    torch.testing.assert_close(drifted["norm.weight"], merged["norm.weight"] + 0.25)
    shards[1]["model.surprise"] = shards[1].pop("model.norm.weight")
    with pytest.raises(UserError, match=r"weights of rank 1: \['norm.weight', 'surprise'\] are not on"):
        merge_shards([stored(shard) for shard in shards])


def test_files_of_all_ranks_are_found(tmp_path: Path) -> None:
    whole = tmp_path / "model.pt"
    names = [f"model_mp_{rank}.pt" for rank in range(11)]
    for name in ("model.pt", *names):
        (tmp_path / name).touch()
    assert shard_files(whole) == [whole]
    assert [file.name for file in shard_files(tmp_path / "model_mp_3.pt")] == names
    (tmp_path / "model_mp_7.pt").unlink()
    with pytest.raises(UserError, match=r"model_mp_\*\.pt: no file of ranks \[7\]"):
        shard_files(tmp_path / "model_mp_0.pt")


def test_reference_names_are_the_published_ones(one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT)
    state = random_state(config)
    reference = to_reference(state, config)
    layer = {
        *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
        *(f"cross_attention.{name}" for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
        *("attention_norm", "cross_attention_norm", "ffn_norm"),
    }
    expected = {f"model.layers.{n}.{name}.weight" for n in range(2) for name in layer}
    expected |= {f"model.{name}.weight" for name in ("tok_embeddings", "norm", "output")}
    assert reference.keys() == expected
    # Of two heads that share keys, 18 rows each, stand their queries, the key and the value.
    fused = state["layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(reference["model.layers.1.attention.wq.weight"][36:], fused[72:108])
    assert torch.equal(reference["model.layers.1.attention.wk.weight"][18:], fused[108:126])
    assert torch.equal(reference["model.layers.1.attention.wv.weight"][18:], fused[126:])
    config = config_for(**WITH_TEXT, action_dim=7)
    with_actions = {name: weight.shape for name, weight in to_reference(random_state(config), config).items()}
    assert {name: shape for name, shape in with_actions.items() if name not in expected} == {
        "model.action_embedding_layers.0.weight": (3, 7),
        "model.action_embedding_layers.0.bias": (3,),
        "model.action_embedding_layers.2.weight": (12, 3),
        "model.action_embedding_layers.2.bias": (12,),
    }


def test_what_does_not_fit_is_named(one_rank: torch.device) -> None:
    config = config_for()
    reference = to_reference(random_state(config), config)
    reference["model.surprise"] = reference.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"1 weights missing \['norm.weight'\], 1 unknown \['surprise'\]"):
        from_reference(reference, config)
    reference["model.norm.weight"] = reference.pop("model.surprise")
    reference["model.layers.0.attention.wk.weight"] = torch.zeros(18, 72)
    with pytest.raises(UserError, match=r"parts of layers.0.self_attention.linear_qkv.weight.*rows as \[2, 1, 1\]"):
        from_reference(reference, config)
    reference["model.layers.0.attention.wqkv.weight"] = torch.zeros(71, 72)
    with pytest.raises(UserError, match="does not fit layers.0.attention.wo.weight"):
        from_reference(reference, config)
