"""Attention from large products is as exact as torch's kernel in the same type, and takes its place where it may."""

from __future__ import annotations

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
    query, key_value = query.bfloat16(), key_value.bfloat16()
    leaves = [x.requires_grad_() for x in (query, key_value[..., 0, :], key_value[..., 1, :])]
    return leaves, torch.randn(NUM_QUERIES, 2, 3, 32).bfloat16()


def _torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = functional.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
    return out.permute(2, 0, 1, 3)


def _with_gradients(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_as_exact_as_torchs_kernel(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    monkeypatch.setattr(module, "_BLOCK_SCORES", 64 * NUM_KEYS)  # several blocks each way, the last not full
    leaves, grad = _inputs(spread)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = _with_gradients(_torch_attention(*exact_leaves), exact_leaves, grad)
    theirs = _with_gradients(_torch_attention(*leaves), leaves, grad)
    ours = _with_gradients(blocked_attention(*leaves), leaves, grad)
    for name, want, other, own in zip(("out", "query", "key", "value"), exact, theirs, ours, strict=True):
        error, allowed = ((x.double() - want).norm() / want.norm() for x in (own, other))
        # Both round probabilities and their gradients to 8 bits; ours also scores, before the exponential. Measured:
        # 0.7 to 1.55 times the error.
        assert error < 1.7 * allowed, name


def test_core_attention_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    (query, key, value), _ = _inputs(1.0, num_keys=NUM_QUERIES)
    calls = []

    def spy(*args: torch.Tensor, **kwargs: float | None) -> torch.Tensor:
        calls.append(args)
        return blocked_attention(*args, **kwargs)

    monkeypatch.setattr("nemo_cosmos.parallel.attention.blocked_attention", spy)
    core = SDPACoreAttention(config_for(), 1, AttnMaskType.no_mask, "cross").eval()
    small = core(query, key, value)
    assert not calls
    monkeypatch.setattr(module, "_MIN_SCORES", NUM_QUERIES * NUM_QUERIES)
    # One step of bfloat16 at values of about 1.
    torch.testing.assert_close(core(query, key, value), small, rtol=0, atol=2**-7)
    assert len(calls) == 1
    core(query, key, value, attn_mask_type=AttnMaskType.causal)
    core(*(x.float() for x in (query, key, value)))
    core.dropout = 0.1
    core.train()(query, key, value)
    assert len(calls) == 1
