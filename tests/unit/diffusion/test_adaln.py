"""Modulation and gates beside their formulas, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nemo_cosmos.diffusion.adaln import add_gated, modulate

TOKENS, DIM = 6, 16


@pytest.mark.parametrize(("groups", "batch"), [(1, 1), (1, 2), (3, 2), (TOKENS, 2)])
def test_modulate_and_gate(groups: int, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, batch, DIM, dtype=torch.float64, requires_grad=True)
    shift, scale, gate = (torch.randn(groups, batch, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))
    leaves, grad = (x, shift, scale, gate), torch.randn_like(x)

    def per_token(vectors: torch.Tensor) -> torch.Tensor:
        return vectors.repeat_interleave(TOKENS // groups, dim=0)

    normed = functional.layer_norm(x, (DIM,), eps=1e-6)
    want = x + per_token(gate) * (normed * (1 + per_token(scale)) + per_token(shift))
    out = add_gated(x, gate, modulate(x, shift, scale, 1e-6))
    # float64: what remains is the order of sums.
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(want, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), wanted, rtol=1e-12, atol=1e-12)
