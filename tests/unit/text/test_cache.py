"""Text embeddings on disk."""

import os
from pathlib import Path

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.text.cache import FOLDER_VARIABLE, EmbeddingCache


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(root: Path, dtype: torch.dtype) -> None:
    cache = EmbeddingCache("a", dtype=dtype)
    assert cache.read("a car") is None
    states = torch.randn(3, 4).to(dtype).float()
    cache.write("a car", states)
    assert torch.equal(EmbeddingCache("a", dtype=dtype).read("a car"), states)


def test_encoders_and_types_and_texts_are_kept_apart(root: Path) -> None:
    EmbeddingCache("a", dtype=torch.float32).write("a car", torch.ones(1, 1))
    assert EmbeddingCache("b", dtype=torch.float32).read("a car") is None
    assert EmbeddingCache("a", dtype=torch.bfloat16).read("a car") is None
    assert EmbeddingCache("a", dtype=torch.float32).read("a car ") is None


def test_no_text_stands_in_the_cache(root: Path) -> None:
    EmbeddingCache("a", dtype=torch.float32).write("secret", torch.ones(1, 1))
    (path,) = root.rglob("*.safetensors")
    assert "secret" not in str(path)
    assert b"secret" not in path.read_bytes()


def test_a_broken_file_is_named(root: Path) -> None:
    cache = EmbeddingCache("a", dtype=torch.float32)
    cache.write("a car", torch.ones(1, 1))
    (path,) = root.rglob("*.safetensors")
    path.write_bytes(b"half")
    with pytest.raises(UserError, match=f"{path}: no whole text embedding"):
        cache.read("a car")


def test_by_default_it_stands_with_the_users_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    EmbeddingCache("a", dtype=torch.float32).write("a car", torch.ones(1, 1))
    assert os.listdir(tmp_path / ".cache") == ["nemo_cosmos"]
