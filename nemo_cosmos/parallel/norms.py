"""Norms that hold under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from nemo_cosmos.parallel.tokens import AutogradContext


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with a weight, over the last axis.

    Under sequence parallelism each tensor-parallel rank sees only its own tokens, so the weight's gradient is a
    partial sum. The weight carries Megatron's `sequence_parallel` mark, by which `finalize_model_grads` adds the
    parts up; torch's own norm lacks it, and Megatron refuses that norm for this reason.

    Args:
        config: Gives `params_dtype` and `sequence_parallel`.
        hidden_size: Length of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises `x` [..., hidden_size]; same shape and dtype."""
        if x.device.type != "cpu":
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """For CPUs, where torch has no kernel for it and composes norm and gradient from twice as many passes.

    x / r times weight, with r the root mean square: the gradient of x is (g w - x mean(g w x) / r^2) / r.
    """

    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        x_wide, grad_wide, weight_wide = x.float(), grad.float(), weight.float()
        product = grad_wide * x_wide
        correction = (product @ weight_wide)[..., None] * inverse**3 / -x.shape[-1]
        grad_weight = torch.mv(product.flatten(0, -2).t(), inverse.flatten())
        grad_x = (grad_wide * weight_wide).mul_(inverse).addcmul_(x_wide, correction)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
