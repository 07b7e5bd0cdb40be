"""`.pt` files as torch reads and writes them."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files import torch_files
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, read_all, stored
from nemo_cosmos.weight_files.torch_files import open_pt, write_pt
from tests.unit.weight_files.test_safetensors_files import TENSORS, assert_same


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_what_torch_reads(tmp_path: Path, mmap: bool) -> None:
    write_pt(tmp_path / "a.pt", stored(TENSORS))
    found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert_same(found, TENSORS)
    assert list(found) == list(TENSORS)
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_tensors_are_aligned_as_torch_aligns_them(tmp_path: Path) -> None:
    write_pt(tmp_path / "a.pt", stored(TENSORS))
    for tensor in torch.load(tmp_path / "a.pt", mmap=True).values():
        assert tensor.data_ptr() % 64 == 0


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write_pt(tmp_path / name, stored(TENSORS))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_torch_writes_is_read_without_its_ties_and_strides(tmp_path: Path) -> None:
    tied = {"one": TENSORS["b.whole"], "same": TENSORS["b.whole"], "part": TENSORS["f.turned"][1:]}
    torch.save(tied, tmp_path / "a.pt")
    found = open_pt(tmp_path / "a.pt")
    assert_same(read_all(found), tied)
    assert found["part"].read().untyped_storage().nbytes() == found["part"].nbytes


def test_the_file_is_mapped_anew_after_every_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({str(i): torch.full((100,), float(i)) for i in range(6)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch_files, "_MOST_MAPPED_BYTES", 800)
    weights, loads = open_pt(tmp_path / "a.pt"), []
    load = torch_files._load_mapped
    monkeypatch.setattr(torch_files, "_load_mapped", lambda path: loads.append(path) or load(path))
    for i in range(6):
        assert (weights[str(i)].read() == i).all()
    assert len(loads) == 3


def test_of_a_training_checkpoint_the_averages_are_taken(tmp_path: Path) -> None:
    trained = {"net.a.weight": torch.zeros(2), "logvar.1.weight": torch.ones(1), "trained_data_record": {"image": 3}}
    whole = {
        "model": {"model": trained, "ema": {"net-a-weight": torch.full((2,), 5.0)}, "trained_data_record": {}},
        "optimizer": {"state": {}},
        "iteration": 7,
    }
    torch.save(whole, tmp_path / "iter_7.pt")
    expected = {"net.a.weight": torch.full((2,), 5.0), "logvar.1.weight": torch.ones(1)}
    assert_same(read_all(open_pt(tmp_path / "iter_7.pt")), expected)
    whole["model"]["ema"] = None
    torch.save(whole, tmp_path / "iter_7.pt")
    assert_same(read_all(open_pt(tmp_path / "iter_7.pt")), expected | {"net.a.weight": torch.zeros(2)})


def test_extra_states_of_transformer_engine_are_left_out(tmp_path: Path) -> None:
    state = {"net.a.weight": torch.ones(2), "net.a._extra_state": io.BytesIO(b"fp8"), "net.b._extra_state": None}
    torch.save(state, tmp_path / "a.pt")
    assert_same(read_all(open_pt(tmp_path / "a.pt")), {"net.a.weight": torch.ones(2)})


class _Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net.a.weight": torch.ones(2), "harm": _Harm()}, "a.pt")
    with pytest.raises(UserError, match="Pickled objects are not run"):
        open_pt(Path("a.pt"))
    assert not Path("harm").exists()


def test_files_that_are_no_state_dicts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_pt(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"not a whole \.pt file"):
        open_pt(tmp_path / "a.pt")
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds a list"):
        open_pt(tmp_path / "a.pt")
    torch.save({"a": 3, "b": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"\['a'\] are no tensors"):
        open_pt(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"hold no \['torch.complex64'\]"):
        write_pt(tmp_path / "b.pt", {"a": StoredTensor.of(torch.zeros(1, dtype=torch.complex64))})
