"""Finds the system packages that no wheel carries, and installs them where it may.

Run before anything else is installed, hence standard library only.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SystemPackage:
    """One thing the system must bring."""

    apt_packages: tuple[str, ...]
    needed_for: str
    is_present: Callable[[], bool]


def _has_library(name: str) -> bool:
    return ctypes.util.find_library(name) is not None


def _can_render_offscreen() -> bool:
    has_egl = _has_library("EGL") and (_has_library("GL") or _has_library("OpenGL"))
    return has_egl or _has_library("OSMesa")


def _can_make_environments() -> bool:
    return importlib.util.find_spec("ensurepip") is not None


VENV = SystemPackage(
    apt_packages=(f"python{sys.version_info.major}.{sys.version_info.minor}-venv",),
    needed_for="creating .venv (Debian and Ubuntu ship ensurepip apart from python)",
    is_present=_can_make_environments,
)
RENDERING = SystemPackage(
    apt_packages=("libegl1", "libgl1"),
    needed_for="rendering the simulators off-screen (MuJoCo with MUJOCO_GL=egl)",
    is_present=_can_render_offscreen,
)


def missing_packages(*wanted: SystemPackage) -> list[SystemPackage]:
    """Returns those of `wanted` that this machine lacks."""
    return [package for package in wanted if not package.is_present()]


def apt_command(missing: list[SystemPackage]) -> list[str]:
    """Returns the command line that installs `missing` on Debian or Ubuntu."""
    names = [name for package in missing for name in package.apt_packages]
    return ["apt-get", "install", "-y", "--no-install-recommends", *names]


def explain(missing: list[SystemPackage]) -> str:
    """Returns what is missing, why it is needed, and the line that installs it."""
    reasons = [f"  {' '.join(package.apt_packages)}: {package.needed_for}" for package in missing]
    return "\n".join(
        [
            "System packages are missing:",
            *reasons,
            "Install them, then run the same command again:",
            f"  sudo apt-get update && sudo {' '.join(apt_command(missing))}",
        ]
    )


def ensure_system_packages(*wanted: SystemPackage) -> None:
    """Installs those of `wanted` that are missing, as root with apt-get; anyone else gets the line to run.

    Raises:
        SystemExit: Something is missing and could not be installed; the message says what and why.
    """
    missing = missing_packages(*wanted)
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(explain(missing))
    print(explain(missing), "\nRunning as root: installing them now.", sep="", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], apt_command(missing)):
        if subprocess.run(command, env=quiet, check=False).returncode != 0:
            raise SystemExit(f"`{' '.join(command)}` failed.\n{explain(missing)}")
    importlib.invalidate_caches()
    if still_missing := missing_packages(*wanted):
        raise SystemExit(explain(still_missing))
