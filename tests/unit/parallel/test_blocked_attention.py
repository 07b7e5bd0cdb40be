"""Attention from large products is as exact as inputs in bfloat16 allow, and is taken where it may be."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional

from nemo_cosmos.parallel import blocked_attention as module
from nemo_cosmos.parallel.attention import SDPACoreAttention
from nemo_cosmos.parallel.blocked_attention import blocked_attention
from tests.unit.parallel.test_backend import config_for

NUM_QUERIES, NUM_KEYS = 150, 90


def _inputs(spread: float, num_keys: int = NUM_KEYS) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value as slices of wider tensors, and the output's gradient; scores spread so many units."""
    torch.manual_seed(0)
    query = spread * torch.randn(NUM_QUERIES, 2, 3, 32)
    key_value = torch.randn(num_keys, 2, 3, 2, 32)
    return [query, key_value[..., 0, :], key_value[..., 1, :]], torch.randn(NUM_QUERIES, 2, 3, 32)


def _rounded(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.bfloat16().requires_grad_() for x in leaves]


def _torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = functional.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
    return out.permute(2, 0, 1, 3)


def _with_gradients(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize(("spread", "kept"), [(1.0, True), (4.0, True), (4.0, False)])
def test_as_exact_as_rounded_inputs_allow(monkeypatch: pytest.MonkeyPatch, spread: float, kept: bool) -> None:
    """Where probabilities are kept for the way back, and where they are too many and made again."""
    num_scores = 2 * 3 * NUM_QUERIES * NUM_KEYS
    monkeypatch.setattr(module, "_MOST_KEPT_SCORES", num_scores if kept else num_scores - 1)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 64 * NUM_KEYS)  # several blocks, the last not full
    inputs, grad = _inputs(spread)
    exact_leaves = [x.double().requires_grad_() for x in inputs]
    exact = _with_gradients(_torch_attention(*exact_leaves), exact_leaves, grad)
    leaves, own_leaves = _rounded(inputs), _rounded(inputs)
    theirs = _with_gradients(_torch_attention(*leaves), leaves, grad)
    out = blocked_attention(*own_leaves)
    assert (len(out.grad_fn.saved_tensors) > 6) is kept
    ours = _with_gradients(out, own_leaves, grad)
    for name, want, other, own in zip(("out", "query", "key", "value"), exact, theirs, ours, strict=True):
        error, allowed = ((x.double() - want).norm() / want.norm() for x in (own, other))
        # Both read inputs of 8 bits and round probabilities and their gradients; ours also scaled queries and scores,
        # which in theory is up to sqrt(2) times the error. Measured: 1.02 to 1.37 times.
        assert error < 1.6 * allowed, name


@pytest.mark.parametrize("sign", [1, -1])
def test_no_power_leaves_the_numbers(sign: int) -> None:
    """All scores as large, or as small, as they may be: all keys weigh the same, forward and backward."""
    query, key = torch.ones(64, 1, 1, 8).bfloat16(), torch.full((64, 1, 1, 8), float(sign)).bfloat16()
    value = torch.randn(64, 1, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    out = blocked_attention(query, key, value, scale=79 / (8 * math.log2(math.e)))
    # Roundings at values below 0.5, and of the gradient's one value.
    torch.testing.assert_close(out.float(), value.float().mean(dim=0, keepdim=True).expand_as(out), rtol=0, atol=2**-9)
    (grad,) = torch.autograd.grad(out, value, torch.full_like(out, 1e-6))
    torch.testing.assert_close(grad.float(), torch.full(grad.shape, 1e-6), rtol=2**-6, atol=0)


def test_core_attention_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.bfloat16() for x in _inputs(1.0, num_keys=NUM_QUERIES)[0])
    calls = []

    def spy(*args: torch.Tensor, **kwargs: float | None) -> torch.Tensor:
        calls.append(args)
        return blocked_attention(*args, **kwargs)

    monkeypatch.setattr("nemo_cosmos.parallel.attention.blocked_attention", spy)
    core = SDPACoreAttention(config_for(), 1, AttnMaskType.no_mask, "cross").eval()
    small = core(query, key, value)
    assert not calls
    monkeypatch.setattr(module, "_MIN_SCORES", NUM_QUERIES * NUM_QUERIES)
    # Two steps of bfloat16 at values of about 1.
    torch.testing.assert_close(core(query, key, value), small, rtol=0, atol=2**-6)
    assert len(calls) == 1
    core(query, key, value, attn_mask_type=AttnMaskType.causal)
    core(*(x.float() for x in (query, key, value)))
    core(20 * query, key, value)  # powers of so large scores are no numbers
    core.dropout = 0.1
    core.train()(query, key, value)
    assert len(calls) == 1
