"""Megatron's parallel linear layers, on CPUs with oneDNN's matrix product.

torch multiplies float32 matrices by MKL, which leaves a good part of an AMD processor unused; oneDNN, which torch
carries too and takes for bfloat16, was 1.11 to 1.19 times as fast on the one measured (an EPYC).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.utils.flop_counter import register_flop_formula

from nemo_cosmos.parallel.tokens import AutogradContext

_MIN_ROWS = 256
"""Fewer rows of input do not pay for oneDNN's own packing of the weight."""
# What `torch.compile` calls for a linear layer on CPUs; there is no public function for it.
ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)

if ONEDNN_LINEAR is not None:

    @register_flop_formula(ONEDNN_LINEAR)
    def _count_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:  # noqa: ANN401 - as torch calls it
        """What torch's own counter, which the throughput's test and the benchmark ask, does not know."""
        return 2 * math.prod(x_shape) * weight_shape[0]


def onednn_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer without gradient, by oneDNN: [..., in] by a weight [out, in] -> [..., out]."""
    return ONEDNN_LINEAR(x, weight, None, "none", [], "")


class ColumnLinear(ColumnParallelLinear):
    """See `megatron.core.tensor_parallel.layers.ColumnParallelLinear`."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401, A002 - Megatron's signature
        if _suits(input, weight, **kwargs):
            return _Linear.apply(input, weight)
        return super()._forward_impl(input, weight, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """See `megatron.core.tensor_parallel.layers.RowParallelLinear`."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401, A002 - Megatron's signature
        if _suits(input, weight, **kwargs):
            return _Linear.apply(input, weight)
        return super()._forward_impl(input, weight, *args, **kwargs)


def _suits(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    **_: Any,  # noqa: ANN401 - what concerns GPUs alone
) -> bool:
    """Whether the layer is a plain product, which exchanges nothing between ranks, and gains by oneDNN."""
    is_plain = bias is None and not allreduce_dgrad and not sequence_parallel
    on_cpu_in_fp32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return ONEDNN_LINEAR is not None and is_plain and on_cpu_in_fp32 and x.numel() >= _MIN_ROWS * x.shape[-1]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = onednn_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # Here both matrices lie the wrong way for oneDNN.
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
