"""Which lines of the lock are installed, and what is asked of the system."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
LOCK = {"torch": "2.13.0", "numpy": "1.26.4", "einops": "0.8.2", "opencv-python-headless": "4.11.0.86"}


def load(name: str) -> ModuleType:
    """Imports a script of requirements/, which is no package."""
    sys.path.insert(0, str(REQUIREMENTS))
    try:
        spec = importlib.util.spec_from_file_location(name, REQUIREMENTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REQUIREMENTS))
    return module


lock = load("lock")
system_libraries = load("system_libraries")
install = load("install")


def ours(version: str, *, is_whole: bool = True) -> object:
    return lock.Installed(version=version, is_ours=True, is_whole=is_whole)


def of_container(version: str) -> object:
    return lock.Installed(version=version, is_ours=False)


def test_bare_environment_gets_the_whole_lock() -> None:
    assert lock.lines_to_install(LOCK, {}) == [f"{name}=={version}" for name, version in LOCK.items()]


def test_environment_as_locked_gets_nothing() -> None:
    installed = {name: ours(version) for name, version in LOCK.items()} | {"torch": ours("2.13.0+cpu")}
    assert lock.lines_to_install(LOCK, installed) == []


def test_wrong_version_of_our_own_is_replaced() -> None:
    installed = {name: ours(version) for name, version in LOCK.items()} | {"einops": ours("0.7.0")}
    assert lock.lines_to_install(LOCK, installed) == ["einops==0.8.2"]


def test_container_packages_stay_whatever_their_version() -> None:
    installed = {"torch": of_container("2.8.0a0+34c6371"), "numpy": of_container("2.1.0")}
    assert lock.lines_to_install(LOCK, installed) == ["einops==0.8.2", "opencv-python-headless==4.11.0.86"]


def test_source_tree_of_the_container_counts_as_installed() -> None:
    assert "torch==2.13.0" not in lock.lines_to_install(LOCK, {}, ["torch"])


def test_substitute_spares_a_second_copy_of_the_same_module() -> None:
    installed = {"opencv-python": of_container("4.12.0")}
    assert lock.lines_to_install({"opencv-python-headless": "4.11.0.86"}, installed) == []


def test_cut_off_installation_is_made_again() -> None:
    installed = {"einops": ours("0.8.2", is_whole=False)}
    assert lock.lines_to_install({"einops": "0.8.2"}, installed) == ["einops==0.8.2"]
    assert lock.broken_lines({"einops": "0.8.2"}, installed) == ["einops==0.8.2"]


def test_installed_distributions_tell_ours_from_the_system() -> None:
    inside = lock.installed_distributions(Path(sys.prefix))
    outside = lock.installed_distributions(Path(os.devnull))
    assert inside["einops"] == lock.Installed(version=LOCK["einops"], is_ours=True)
    assert not outside["einops"].is_ours
    assert inside["pyyaml"].version == outside["pyyaml"].version


def test_repository_lock_is_well_formed() -> None:
    locked = lock.read_lock()
    assert len(locked) > 250
    assert list(locked) == sorted(locked)


@pytest.mark.parametrize("text", ["einops>=0.8\n", "einops\n", "einops==1\nEinops==2\n"])
def test_malformed_lock_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.txt").write_text(text)
    with pytest.raises(ValueError, match="is not one `name==version` per distribution"):
        lock.read_lock(tmp_path / "lock.txt")


def test_system_package_message_has_the_line_and_the_reason() -> None:
    missing = system_libraries.SystemPackage(
        apt_packages=("libegl1", "libgl1"), needed_for="rendering", is_present=lambda: False
    )
    present = system_libraries.SystemPackage(apt_packages=("make",), needed_for="this", is_present=lambda: True)
    assert system_libraries.missing_packages(missing, present) == [missing]
    text = system_libraries.explain([missing])
    assert "libegl1 libgl1: rendering" in text
    assert "sudo apt-get update && sudo apt-get install -y --no-install-recommends libegl1 libgl1" in text


def test_user_without_root_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = system_libraries.SystemPackage(apt_packages=("libegl1",), needed_for="tests", is_present=lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="apt-get install -y --no-install-recommends libegl1"):
        system_libraries.ensure_system_packages(missing)


def test_root_installs_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def note(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    package = system_libraries.SystemPackage(
        apt_packages=("libegl1",), needed_for="tests", is_present=lambda: len(commands) == 2
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", note)
    system_libraries.ensure_system_packages(package)
    assert commands == [["apt-get", "update"], system_libraries.apt_command([package])]


def test_stamp_follows_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = install.stamp_of(on_top_of_system=False)
    assert before == install.stamp_of(on_top_of_system=False)
    assert before != install.stamp_of(on_top_of_system=True)
    changed = tmp_path / "lock.txt"
    changed.write_text("einops==0.8.2\n")
    monkeypatch.setattr(install, "LOCK_FILE", changed)
    assert before != install.stamp_of(on_top_of_system=False)


def test_second_run_installs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "has_container_stack", lambda: False)
    (tmp_path / install.STAMP).write_text(install.stamp_of(on_top_of_system=False))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    install.make_environment(tmp_path, None)


def test_environment_on_top_of_a_container_sees_its_packages(tmp_path: Path) -> None:
    """This very environment plays the container: it has torch, Megatron and NeMo, and is itself a venv."""
    python = install.create_environment(tmp_path / "on_top", on_top_of_system=True)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import lock; import torch; print(torch.__file__)\n"
    code += "print(lock.lines_to_install({'torch': '0', 'megatron-core': '0', 'numpy': '0', 'absent': '1'},"
    code += " lock.installed_distributions(), lock.source_trees()))"
    done = subprocess.run([python, "-c", code, REQUIREMENTS], capture_output=True, text=True, check=True)
    where, lines = done.stdout.splitlines()
    assert Path(where).is_relative_to(sys.prefix)
    assert lines == "['absent==1']"


def test_container_stack_is_recognised() -> None:
    assert install.has_container_stack()  # Megatron is installed beside this test


@pytest.mark.parametrize(("version_py", "expected"), [("cuda: str | None = '12.8'\n", True), ("cuda = None\n", False)])
def test_torch_with_cuda_is_a_container_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version_py: str, expected: bool
) -> None:
    (tmp_path / "version.py").write_text(version_py)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
    assert install.has_container_stack() is expected
