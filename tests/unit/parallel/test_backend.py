"""Backends, norms and the core attention on one rank."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.attention import SDPACoreAttention
from nemo_cosmos.parallel.backend import TorchBackend, get_backend, te_core_attention
from nemo_cosmos.parallel.norms import RMSNorm


@pytest.fixture
def one_rank() -> Iterator[None]:
    with startup.initialize():
        yield


def config_for(**overrides) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, **overrides})


def core_attention(mask: AttnMaskType, **overrides) -> SDPACoreAttention:
    return SDPACoreAttention(config_for(attention_dropout=0.0), 1, mask, "self", **overrides)


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbnh,tbnh->bnst", query, key) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return torch.einsum("bnst,tbnh->sbnh", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", [AttnMaskType.no_mask, AttnMaskType.causal])
def test_attention_equals_its_formula(groups: int, mask: AttnMaskType, one_rank: None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 2, 4, 8, generator=generator)
    key, value = torch.randn(2, 6, 2, groups, 8, generator=generator)
    expected = written_out(query, key, value, mask == AttnMaskType.causal)
    torch.testing.assert_close(core_attention(mask)(query, key, value), expected, rtol=0, atol=1e-6)
    overridden = core_attention(AttnMaskType.no_mask)(query, key, value, attn_mask_type=mask)
    torch.testing.assert_close(overridden, expected, rtol=0, atol=1e-6)


def test_attention_refuses_what_it_cannot_do(one_rank: None) -> None:
    x = torch.zeros(6, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="mask"):
        core_attention(AttnMaskType.no_mask)(x, x, x, torch.zeros(1))
    with pytest.raises(UserError, match=r"a2a\+p2p.*'a2a', 'all_gather', 'p2p'"):
        core_attention(AttnMaskType.no_mask, cp_comm_type="a2a+p2p")


def test_backend_by_name() -> None:
    assert get_backend("torch").name == "torch"
    with pytest.raises(UserError, match="'auto', 'torch' or 'te'"):
        get_backend("jax")


@pytest.mark.parametrize("cuda", [False, True])
def test_a_machine_without_transformer_engine_takes_torch(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert get_backend("auto").name == "torch"


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is installed")
def test_missing_transformer_engine_is_said() -> None:
    with pytest.raises(UserError, match="TransformerEngine to be installed.*backend 'torch'"):
        get_backend("te")


def test_norm_carries_the_mark_of_sequence_parallelism() -> None:
    for enabled in (False, True):
        config = config_for(sequence_parallel=enabled, tensor_model_parallel_size=2, params_dtype=torch.bfloat16)
        norm = TorchBackend.rms_norm(config, 8, eps=1e-6)
        assert isinstance(norm, RMSNorm)
        assert norm.weight.sequence_parallel is enabled
        assert norm.weight.dtype == torch.bfloat16


def test_norm_equals_its_formula() -> None:
    norm = RMSNorm(config_for(), 8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)


class RecordedAttention(torch.nn.Module):
    """Stands for TransformerEngine's attention, which needs a GPU to be imported; keeps its arguments."""

    def __init__(self, config: TransformerConfig, *args: object, cp_comm_type: str, **kwargs: object) -> None:
        super().__init__()
        self.context_parallel_size, self.cp_comm_type = config.context_parallel_size, cp_comm_type
        shares = config.context_parallel_size > 1
        self.cp_group, self.cp_global_ranks, self.cp_stream = ("group", [0, 1], "stream") if shares else (None,) * 3

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type) -> None:
        self.cp_group, self.cp_global_ranks, self.cp_stream = cp_group, cp_global_ranks, cp_stream
        self.cp_comm_type = cp_comm_type


@pytest.mark.parametrize(
    ("attention_type", "context", "wanted", "expected"),
    [
        ("self", 2, None, (2, "a2a")),
        ("self", 3, None, (3, "p2p")),
        ("self", 2, "p2p", (2, "p2p")),
        ("cross", 2, None, (1, "a2a")),
    ],
)
def test_transformer_engine_attention_is_told_how_tokens_lie(
    attention_type: str, context: int, wanted: str | None, expected: tuple[int, str]
) -> None:
    adapted = te_core_attention(RecordedAttention)
    config = config_for(context_parallel_size=context)
    built = adapted(config, 1, AttnMaskType.no_mask, attention_type, cp_comm_type=wanted)
    assert (built.context_parallel_size, built.cp_comm_type) == expected
    assert config.context_parallel_size == context


def test_transformer_engine_attention_stops_sharing_tokens_and_begins_again() -> None:
    config = config_for(context_parallel_size=2)
    built = te_core_attention(RecordedAttention)(config, 1, AttnMaskType.no_mask, "self")
    built.share_tokens(False)
    assert (built.cp_group, built.cp_global_ranks, built.cp_stream) == (None, None, None)
    built.share_tokens(True)
    assert (built.cp_group, built.cp_global_ranks, built.cp_stream, built.cp_comm_type) == (
        "group",
        [0, 1],
        "stream",
        "a2a",
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(config_for(), 24, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(7, 2, 3, 24, dtype=dtype, requires_grad=True), torch.randn(7, 2, 3, 24, dtype=dtype)
    results = [norm(x), torch.nn.functional.rms_norm(x, (24,), norm.weight, 1e-6)]
    # Two steps of the type at the largest values, which are below 16 for the sums of the weight's gradient.
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        *(torch.autograd.grad(result, (x, norm.weight), grad) for result in results), rtol=tolerance, atol=tolerance
    )
