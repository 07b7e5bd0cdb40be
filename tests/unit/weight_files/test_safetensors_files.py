"""Safetensors files as the library reads and writes them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.weight_files.safetensors_files import open_safetensors, open_shards, write_safetensors, write_shards
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, read_all, stored

TENSORS = {
    "a.half": torch.arange(6).reshape(2, 3).bfloat16(),
    "b.whole": torch.arange(5, dtype=torch.float32),
    "c.number": torch.tensor(7),
    "d.flag": torch.tensor([True, False]),
    "e.none": torch.zeros(0, 3),
    "f.turned": torch.arange(6.0).reshape(2, 3).T,
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_written_is_what_the_library_reads_and_back(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours.safetensors", stored(TENSORS))
    assert_same(load_file(tmp_path / "ours.safetensors"), TENSORS)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs.safetensors")
    opened = open_safetensors(tmp_path / "theirs.safetensors")
    assert {name: (weight.shape, weight.dtype) for name, weight in opened.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert_same(read_all(opened), TENSORS)


def test_equal_weights_in_another_order_give_the_same_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", stored(TENSORS))
    write_safetensors(tmp_path / "b", stored(dict(reversed(TENSORS.items()))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_cast_touches_floating_point_numbers_alone() -> None:
    cast = {name: weight.to(torch.float16) for name, weight in stored(TENSORS).items()}
    assert_same(read_all(cast), {n: t.half() if t.is_floating_point() else t for n, t in TENSORS.items()})


def test_large_weights_are_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.full((100,), float(i)) for i in range(5)}
    write_shards(tmp_path, "model.safetensors", stored(tensors), max_shard_size="1KB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    assert read_json(tmp_path / "model.safetensors.index.json")["metadata"]["total_size"] == 2000
    assert_same(read_all(open_shards(tmp_path, "model.safetensors")), tensors)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors: no such file"):
        open_shards(tmp_path, "model.safetensors")
    save_file({"layer0": tensors["layer0"]}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match=r"lists \['layer1'\], which the files do not hold"):
        open_shards(tmp_path, "model.safetensors")


def test_small_weights_are_one_file(tmp_path: Path) -> None:
    write_shards(tmp_path, "model.safetensors", stored(TENSORS), max_shard_size="1KB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(read_all(open_shards(tmp_path, "model.safetensors")), TENSORS)


def test_broken_files_and_foreign_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_safetensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_safetensors(tmp_path / "a.safetensors")
    complex_weight = StoredTensor.of(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"hold no \['torch.complex64'\]"):
        write_safetensors(tmp_path / "b.safetensors", {"a": complex_weight})
    save_file({"a": torch.zeros(1, dtype=torch.uint16)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"types \['U16'\]"):
        open_safetensors(tmp_path / "c.safetensors")
