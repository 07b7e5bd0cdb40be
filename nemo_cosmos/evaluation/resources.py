"""Wall time and peak memory of a step, and what machine it ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil

_NAMED_PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "nemo-curator", "nemo-run", "lightning")


@dataclass(kw_only=True)
class StepResources:
    """What a step used; complete when the `measured` block has ended."""

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    """Highest sum of resident memory of this process and all below it, 2^20 bytes; pages shared between them count
    in each."""


@contextlib.contextmanager
def measured(*, interval_s: float = 0.2) -> Iterator[StepResources]:
    """Measures a block, also when it raises.

    Args:
        interval_s: Time between two looks at memory; a peak shorter than this can be missed.

    Yields:
        The record that is filled in while the block runs.
    """
    used, done = StepResources(), threading.Event()
    process = psutil.Process()

    def look() -> None:
        used.peak_memory_mb = max(used.peak_memory_mb, _resident_mb(process))

    def watch() -> None:
        while not done.wait(interval_s):
            look()

    look()
    watcher = threading.Thread(target=watch, name="memory-watch", daemon=True)
    start = time.perf_counter()
    watcher.start()
    try:
        yield used
    finally:
        used.seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        look()


def describe_machine() -> dict[str, str]:
    """Returns processor, cores, memory, system and the versions of the packages that matter, in words."""
    described = {
        "processor": _processor_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in _NAMED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            described[package] = version(package)
    return described


def _resident_mb(process: psutil.Process) -> float:
    total = 0
    for member in (process, *process.children(recursive=True)):
        # A child may end between being listed and being asked.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += member.memory_info().rss
    return total / 2**20


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
