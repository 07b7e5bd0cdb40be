"""Comparing what many ranks computed with what one did."""

from __future__ import annotations

import torch


def assert_same(
    name: str, got: torch.Tensor, expected: torch.Tensor, *, relative: float = 2e-6, floor: float = 1e-9
) -> None:
    """Compares to the scale of the largest value, since sums over ranks are in another order.

    Args:
        name: What it is, for the message.
        got: Of many ranks.
        expected: Of one.
        relative: Largest error, over the largest expected value; float32 keeps 1.2e-7.
        floor: Error that is always allowed, for what is left of larger numbers that cancel.
    """
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    error = (got - expected).abs().max().item()
    assert error <= relative * scale + floor, f"{name}: off by {error:.3g} where values reach {scale:.3g}"
