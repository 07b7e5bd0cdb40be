"""Norms that hold under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional


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
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
