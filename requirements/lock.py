"""Reads the lock and tells which of its lines an environment still needs.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LOCK_FILE = Path(__file__).with_name("lock.txt")

SUBSTITUTES = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless", "opencv"),
    "onnxruntime": ("onnxruntime-gpu",),
    "faiss-cpu": ("faiss-gpu", "faiss-gpu-cu12"),
}
"""Locked distribution -> others that bring the same modules: a second copy beside them would break both."""

IMPORTED_AS = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "nemo-toolkit": "nemo",
    "nemo-run": "nemo_run",
    "numpy": "numpy",
}
"""Distributions that containers also put on the path as bare source trees, with the module that shows it."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A distribution that the interpreter can see."""

    version: str
    is_ours: bool
    """Stands in the environment itself, not in the system or container below it."""
    is_whole: bool = True
    """False when an interrupted installation left only part of it."""


def canonical(name: str) -> str:
    """Returns the normalised distribution name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path = LOCK_FILE) -> dict[str, str]:
    """Reads `name==version` lines.

    Returns:
        Version by normalised name, in the order of the file.

    Raises:
        ValueError: A line is not of that form, or a name stands twice.
    """
    locked: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, version = line.strip().partition("==")
        if not separator or canonical(name) in locked:
            raise ValueError(f"{path}: {line!r} is not one `name==version` per distribution")
        locked[canonical(name)] = version
    return locked


def installed_distributions(prefix: Path | None = None) -> dict[str, Installed]:
    """Returns what this interpreter sees, by normalised name; the first on the path wins, as in imports.

    Args:
        prefix: Root of the environment; the interpreter's own unless given.
    """
    prefix = (prefix or Path(sys.prefix)).resolve()
    found: dict[str, Installed] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or canonical(name) in found:
            continue
        is_ours = Path(str(distribution.locate_file(""))).resolve().is_relative_to(prefix)
        is_whole = not is_ours or distribution.read_text("INSTALLER") is not None
        found[canonical(name)] = Installed(version=distribution.version, is_ours=is_ours, is_whole=is_whole)
    return found


def source_trees(prefix: Path | None = None) -> set[str]:
    """Returns the distributions of `IMPORTED_AS` whose module is importable from outside the environment.

    Args:
        prefix: Root of the environment; the interpreter's own unless given.
    """
    prefix = (prefix or Path(sys.prefix)).resolve()
    return {name for name, module in IMPORTED_AS.items() if _is_importable_from_outside(module, prefix)}


def lines_to_install(
    locked: dict[str, str], installed: dict[str, Installed], importable: Iterable[str] = ()
) -> list[str]:
    """Chooses the lock lines that are still to be installed.

    What the system or container below the environment brings is kept whatever its version: its torch,
    TransformerEngine and Megatron are built for each other. What the environment itself holds must be as locked.

    Args:
        locked: What `read_lock` gave.
        installed: What `installed_distributions` gave.
        importable: What `source_trees` gave: to be kept although no distribution says so.

    Returns:
        `name==version` lines in the lock's order.
    """
    return [
        f"{name}=={version}"
        for name, version in locked.items()
        if _is_needed(name, version, installed, frozenset(importable))
    ]


def broken_lines(locked: dict[str, str], installed: dict[str, Installed]) -> list[str]:
    """Returns the lock lines whose installation was cut off; pip takes them for installed."""
    return [f"{name}=={locked[name]}" for name, own in installed.items() if name in locked and not own.is_whole]


def _is_needed(name: str, version: str, installed: dict[str, Installed], importable: frozenset[str]) -> bool:
    own = installed.get(name)
    if own is None:
        return name not in importable and not any(other in installed for other in SUBSTITUTES.get(name, ()))
    if not own.is_ours:
        return False
    return not own.is_whole or own.version.partition("+")[0] != version


def _is_importable_from_outside(module: str, prefix: Path) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    places = list(spec.submodule_search_locations or ()) if spec else []
    return any(not Path(place).resolve().is_relative_to(prefix) for place in places)
