"""Makes the project's environment: `python requirements/install.py [--venv .venv] [--torch-index URL]`.

With `--here` it adds to the running python's packages instead, for a container image.

Everything is installed from `lock.txt` without resolving. On a bare machine that is the whole lock; in an NGC
container the environment stands on top of the container's packages and only what those lack is added. Interrupted at
any moment it can be run again, and a run that finds nothing to do installs nothing.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from lock import LOCK_FILE, broken_lines, installed_distributions, lines_to_install, read_lock, source_trees
from system_libraries import RENDERING, VENV, ensure_system_packages

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".installed-sha256"
BUILD_TOOLS = ("setuptools==", "wheel==")
SUPPORTED_PYTHON = (3, 11)
CONTAINER_SCRIPTS = ("torchrun", "nemo", "ray", "pytest", "ruff")
PARENT_PTH = "_packages_of_the_container.pth"


def has_container_stack() -> bool:
    """Tells whether this python already has a GPU stack that must not be replaced."""
    if importlib.util.find_spec("transformer_engine") or importlib.util.find_spec("megatron"):
        return True
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    version_file = Path(torch.origin).with_name("version.py")
    return version_file.is_file() and re.search(r"^cuda\b.*=\s*['\"]", version_file.read_text(), re.M) is not None


def create_environment(folder: Path, *, on_top_of_system: bool) -> Path:
    """Creates the virtual environment unless a working one is there.

    Args:
        folder: Root of the environment.
        on_top_of_system: Whether the packages of the running python shall show through.

    Returns:
        The environment's python.
    """
    python = folder / "bin" / "python"
    if not _has_pip(python):
        builder = venv.EnvBuilder(system_site_packages=on_top_of_system, with_pip=True, clear=folder.exists())
        builder.create(folder)
    if on_top_of_system and sys.prefix != sys.base_prefix:
        _show_parent_environment(folder)
    return python


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def _show_parent_environment(folder: Path) -> None:
    """Containers may keep their packages in an environment of their own, which a nested one does not see by itself."""
    parent_folders = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({path!r})" for path in parent_folders]
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site_packages / PARENT_PTH).write_text("\n".join(lines) + "\n")


def install_missing(torch_index: str | None, *, keep_present: bool) -> None:
    """Installs into the running environment what the lock asks for and is not there, then this package.

    PyTorch comes first and with its own dependencies: a CUDA build has some that the lock cannot name. They are held
    to the lock where it does name them.

    Args:
        torch_index: An extra package index for torch.
        keep_present: Replace nothing that is there already, whatever its version: for the image of a container.
    """
    ours = None if not keep_present else Path(os.devnull)
    locked, installed = read_lock(), installed_distributions(ours)
    needed = lines_to_install(locked, installed, source_trees(ours))
    print(f"{len(needed)} of {len(locked)} locked distributions to install", flush=True)
    extra_index = ["--extra-index-url", torch_index] if torch_index else []
    _pip_install([line for line in needed if line.startswith(BUILD_TOOLS)], "--no-deps")
    _pip_install([line for line in needed if line.startswith("torch==")], "-c", str(LOCK_FILE), *extra_index)
    _pip_install(broken_lines(locked, installed), "--no-deps", "--no-build-isolation", "--ignore-installed")
    still_needed = lines_to_install(locked, installed_distributions(ours), source_trees(ours))
    _pip_install(still_needed, "--no-deps", "--no-build-isolation")
    _pip_install(["-e", str(ROOT)], "--no-deps", "--no-build-isolation")


def _pip_install(arguments: list[str], *options: str) -> None:
    if not arguments:
        return
    # A container's PIP_CONSTRAINT speaks of its own packages, which are never touched here, and so does the mark that
    # its python is managed by others.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    command = [*_pip_command(), "install", "--quiet", *options, *arguments]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise SystemExit("pip failed as said above. Run the same command again: it goes on with what is still missing.")
    importlib.invalidate_caches()


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is None and shutil.which("uv") is not None:
        return ["uv", "pip", "--python", sys.executable]  # containers whose environment was made by uv have no pip
    return [sys.executable, "-m", "pip"]


def add_container_scripts(names: tuple[str, ...] = CONTAINER_SCRIPTS) -> None:
    """Gives the environment those commands that so far start the container's python, which does not see it."""
    folder = Path(sys.prefix) / "bin"
    for entry_point in importlib.metadata.entry_points(group="console_scripts"):
        script = folder / entry_point.name
        if entry_point.name in names and not script.exists():
            call = f"from {entry_point.module} import {entry_point.attr}; sys.exit({entry_point.attr}())"
            script.write_text(f"#!{sys.executable}\nimport sys; {call}\n")
            script.chmod(0o755)


def stamp_of(*, on_top_of_system: bool) -> str:
    """Returns the hash of all that decides what an environment holds."""
    digest = hashlib.sha256(f"{sys.version}{sys.prefix}{on_top_of_system}".encode())
    for path in (LOCK_FILE, ROOT / "setup.py", *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_environment(folder: Path, torch_index: str | None) -> None:
    """Makes the environment in `folder`, or finds that it is there already.

    Raises:
        SystemExit: A system package is missing, python is too old, or pip failed; the message says how to go on.
    """
    if sys.version_info < SUPPORTED_PYTHON:
        raise SystemExit(f"python {sys.version.split()[0]} is too old: 3.11 or newer is needed. Use `make PYTHON=...`.")
    if Path(sys.prefix).resolve() == folder:  # started by the environment's own python: the one below it makes it
        below = str(getattr(sys, "_base_executable"))  # noqa: B009 - not in typeshed
        os.execv(below, [below, *sys.argv])
    ensure_system_packages(VENV, RENDERING)
    on_top_of_system = has_container_stack()
    stamp_file, stamp = folder / STAMP, stamp_of(on_top_of_system=on_top_of_system)
    if stamp_file.is_file() and stamp_file.read_text() == stamp:
        return
    kind = "on top of this container's packages" if on_top_of_system else "from the lock alone"
    print(f"making {folder} {kind}; this takes a few minutes the first time", flush=True)
    python = create_environment(folder, on_top_of_system=on_top_of_system)
    command = [str(python), __file__, "--inside", *(["--torch-index", torch_index] if torch_index else [])]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(1)
    stamp_file.write_text(stamp)


def main() -> None:
    """Reads the command line and makes the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="where to make it (default: .venv at the root)"
    )
    parser.add_argument("--torch-index", help="an extra package index for torch, such as PyTorch's CPU wheel index")
    parser.add_argument(
        "--here", action="store_true", help="add to the running python's packages, for a container image"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        ensure_system_packages(RENDERING)
        install_missing(arguments.torch_index, keep_present=True)
    elif arguments.inside:
        install_missing(arguments.torch_index, keep_present=False)
        add_container_scripts()
    else:
        make_environment(arguments.venv.resolve(), arguments.torch_index)


if __name__ == "__main__":
    main()
