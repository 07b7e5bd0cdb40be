"""The one place that decides where tensors live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch


def current_device() -> torch.device:
    """This rank's GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_device(numbers: Sequence[float] | torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Makes a tensor of numbers that the host knows; it waits for nothing that the device still has to do.

    Args:
        numbers: A list, or a tensor on the CPU.
        device: Where to.
        dtype: Of the result.
    """
    made = torch.as_tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def fast_precision() -> Literal["bf16-mixed", "32"]:
    """The precision that trains fastest here: bf16 where the processor multiplies it natively, else float32.

    Every GPU that is supported does, and CPUs with AVX512-BF16 or AMX do.
    """
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - torch offers no public question
    return "bf16-mixed" if native else "32"


def matmul_flops_per_s(dtype: torch.dtype) -> float:
    """Measures what a large matrix multiplication reaches on this rank's device: the best of a few, after a warm-up.

    Args:
        dtype: Of both factors.

    Returns:
        Floating-point operations per second; a multiplication and an addition are two.
    """
    device = current_device()
    size = 8192 if device.type == "cuda" else 512
    # Drawn numbers, for equal ones take a GPU less power, and it multiplies more of them than of any that training has;
    # by a generator of their own, since those of the run must not notice.
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float32, device=device).to(dtype)
    result = torch.empty_like(factor)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(factor, factor, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
