"""Time and memory of calls in this process."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_COUNTED = 2
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What repeated calls of one function took."""

    seconds: float
    """Median of one call."""
    peak_mib: float
    """Most memory that a call added to the process; weights and inputs do not count."""


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Measurement]:
    """Measures functions in turn, so that a machine that slows down slows all of them.

    In its turn a function is called once uncounted, and then counted: after the turn of another one it finds caches and
    memory as the other needed them, and not as they are in a loop of its own. Memory is measured apart, for before it
    is, what earlier calls left goes back to the system.

    Args:
        calls: Functions of no argument by name.
        rounds: Turns of each, of two counted calls.
    """
    peaks = {name: _peak_mib(call) for name, call in calls.items()}
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            runs[name] += [_seconds(call) for _ in range(_COUNTED)]
    return {name: Measurement(seconds=statistics.median(runs[name]), peak_mib=peaks[name]) for name in calls}


def _seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _peak_mib(call: Callable[[], object]) -> float:
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")  # the high-water mark becomes what is resident now
    before = _kib("VmRSS")
    result = call()
    peak = _kib("VmHWM")
    del result
    return (peak - before) / 1024


def _kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {field}; these benchmarks run on Linux")


def gemm_peak(dtype: torch.dtype) -> float:
    """Returns FLOP/s of the best square matrix product on the threads that torch uses now."""
    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def machine() -> str:
    """Names the processor and the versions that figures depend on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads at most, torch {torch.__version__}"
