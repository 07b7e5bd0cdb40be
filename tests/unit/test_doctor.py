"""The doctor names what is there, and what its absence costs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from nemo_cosmos import doctor


def found(name: str) -> doctor.Finding:
    return next(finding for finding in doctor.diagnose() if finding.name == name)


def test_installed_packages_are_found_with_their_versions() -> None:
    for name, distribution in (("PyTorch", "torch"), ("Megatron-core", "megatron-core"), ("NeMo", "nemo-toolkit")):
        finding = found(name)
        assert finding.ok
        assert importlib.metadata.version(distribution) in finding.describe()


def test_absent_package_says_what_will_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = found("face detector")
    assert not finding.ok
    assert finding.describe() == "not installed; without it no face blurring"


def test_package_without_metadata_counts_as_present(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("MuJoCo").ok


def test_missing_weights_and_small_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    assert found("weights tokenizer_tiny").describe() == "missing; without it no start from trained weights"
    assert not found("free disk").ok


def test_weights_need_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    (tmp_path / "tokenizer_tiny.safetensors").write_bytes(b"\0" * 2**20)
    assert not found("weights tokenizer_tiny").ok
    (tmp_path / "tokenizer_tiny.json").write_text("{}")
    assert found("weights tokenizer_tiny").describe().startswith("1.0 MiB")


def test_gpu_is_optional() -> None:
    assert found("CUDA devices").is_optional
    assert found("TransformerEngine").is_optional
