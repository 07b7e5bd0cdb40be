"""Layers without gradient, for the few rows of input that a decoding step has.

On CPUs calling small operations is then what takes time. So everything that depends on the weight alone is settled when
the layer is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nemo_cosmos.parallel.linear import ONEDNN_LINEAR, onednn_linear

Layer = Callable[[Tensor], Tensor]


def few_rows_linear(weight: Tensor, *, compiled: bool = False) -> Layer:
    """A linear layer.

    Args:
        weight: [out, in].
        compiled: Whether `torch.compile` will see it.

    Returns:
        [rows, in] -> [rows, out].
    """
    if weight.device.type != "cpu" or compiled:
        return partial(functional.linear, weight=weight)
    if weight.dtype == torch.float32 and ONEDNN_LINEAR is not None:
        return lambda x: onednn_linear(x, weight)
    # What the function for any number of axes comes to, with fewer calls on its way.
    turned = weight.t()
    return lambda x: torch.mm(x, turned)


def few_rows_rms_norm(weight: Tensor, eps: float, *, compiled: bool = False) -> Layer:
    """A root-mean-square norm, of fewer operations than torch's own.

    Args:
        weight: [size].
        eps: Added to the mean square.
        compiled: Whether `torch.compile` will see it.

    Returns:
        [..., size] -> the same shape and dtype.
    """
    size = len(weight)
    if weight.device.type != "cpu" or compiled:
        return partial(functional.rms_norm, normalized_shape=(size,), weight=weight, eps=eps)
    zeros = torch.zeros_like(weight)[None]  # of a row's shape: adding one number to each takes twice as long
    times = weight.float() * math.sqrt(size)
    added = torch.tensor(math.sqrt(size * eps))

    def norm(x: Tensor) -> Tensor:
        if x.numel() == size:
            scale = (torch.linalg.vector_norm(x, dtype=torch.float32).item() ** 2 / size + eps) ** -0.5
            return torch.addcmul(zeros, x, weight, value=scale)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(added)
        return (x / length).mul_(times).to(x.dtype)

    return norm
