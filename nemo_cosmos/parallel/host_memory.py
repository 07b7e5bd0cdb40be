"""The C library's memory while a model trains on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of `mallopt` in glibc's malloc.h."""
_LARGEST_MMAP_THRESHOLD = 2**25
"""More than this is refused."""
_NEVER = -1


def keep_freed_memory() -> None:
    """Lets this process keep what tensors of less than 32 MiB leave behind, as torch's allocator for GPUs does.

    A training step asks for the same memory each time. glibc gives much of it back to the system in between, which
    must then find and clear the pages anew. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
