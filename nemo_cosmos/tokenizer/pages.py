"""Large tensors in pages of their own, which the system has back as soon as the tensor is gone.

`malloc` keeps what is freed between blocks in use, and often puts the next large tensor elsewhere: a network whose
tensors have many sizes comes to take twice the memory of all that is alive at once.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_MIN_BYTES = 2**21
"""One huge page; smaller tensors are the allocator's."""


def empty(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_empty(shape)`, for a tensor in the CPU's memory."""
    num_bytes = math.prod(shape) * like.element_size()
    if num_bytes < _MIN_BYTES:
        return like.new_empty(shape)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not every system has them
        pages.madvise(mmap.MADV_HUGEPAGE)  # first use of a page costs, and there are 512 times fewer
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
