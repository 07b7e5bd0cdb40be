"""Splitting, gathering and attention over context-parallel ranks equal one rank, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.attention import SDPACoreAttention
from nemo_cosmos.parallel.tokens import (
    causal_shard,
    count_once,
    gather_tokens,
    natural_order,
    split_tokens,
    token_shard,
    zigzag,
)
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

TOKENS, BATCH, HEAD_DIM = 8, 2, 4
CASES = [
    # query heads, key heads, mask, exchange; 3 heads do not divide by 2 ranks, 1 key head must be repeated
    (4, 4, AttnMaskType.no_mask, None),
    (4, 4, AttnMaskType.causal, None),
    (4, 2, AttnMaskType.causal, None),
    (4, 1, AttnMaskType.no_mask, None),
    (3, 3, AttnMaskType.no_mask, None),
    (3, 1, AttnMaskType.causal, None),
    (4, 4, AttnMaskType.causal, "all_gather"),
    (4, 4, AttnMaskType.no_mask, "p2p"),
    (4, 2, AttnMaskType.no_mask, "p2p"),
    (3, 1, AttnMaskType.causal, "p2p"),
]


def check_attention(rank: int, folder: Path, num_ranks: int) -> None:
    with startup.initialize(context=num_ranks):
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        for heads, key_heads, mask, exchange in CASES:
            compare_attention(groups, heads, key_heads, mask, exchange)
        if num_ranks == 4:
            return
        config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=3, attention_dropout=0.0)
        strict = SDPACoreAttention(config, 1, AttnMaskType.no_mask, "self", cp_comm_type="a2a", pg_collection=groups)
        x = torch.zeros(4, 1, 3, HEAD_DIM)
        with pytest.raises(UserError, match="divisible"):
            strict(x, x, x)
        compare_cross_attention(config, groups)


def random_qkv(heads: int, key_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, BATCH, n, HEAD_DIM) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def one_rank_attention(qkv: list[torch.Tensor], causal: bool) -> torch.Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in qkv)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def compare_attention(
    groups: ProcessGroupCollection, heads: int, key_heads: int, mask: AttnMaskType, exchange: str | None
) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * HEAD_DIM, num_attention_heads=heads, attention_dropout=0.0
    )
    core = SDPACoreAttention(config, 1, mask, "self", cp_comm_type=exchange, pg_collection=groups)
    whole, split = random_qkv(heads, key_heads), random_qkv(heads, key_heads)
    expected = one_rank_attention(whole, mask == AttnMaskType.causal)
    num_ranks = groups.cp.size() if mask == AttnMaskType.causal else 1
    pieces = [split_tokens(zigzag(x, num_ranks), groups, sequence_parallel=False) for x in split]
    got = natural_order(gather_tokens(core(*pieces), groups, sequence_parallel=False), num_ranks)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, many in zip(whole, split, strict=True):
        torch.testing.assert_close(many.grad, one.grad, rtol=0, atol=2e-6)


def compare_cross_attention(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    core = SDPACoreAttention(config, 1, AttnMaskType.no_mask, "cross", pg_collection=groups)
    query, key, value = (x.detach() for x in random_qkv(3, 3))
    expected = one_rank_attention([query, key[:5], value[:5]], causal=False)
    got = core(split_tokens(query, groups, sequence_parallel=False), key[:5], value[:5])
    torch.testing.assert_close(gather_tokens(got, groups, sequence_parallel=False), expected, rtol=0, atol=1e-6)


def check_tokens(rank: int, folder: Path) -> None:
    with startup.initialize(tensor=2, context=2):
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        x = torch.arange(24.0).reshape(12, 2).requires_grad_()
        shard = token_shard(12, groups, sequence_parallel=True)
        assert (shard.start, shard.stop) == (3 * rank, 3 * rank + 3)  # context parallel outside, tensor parallel inside
        piece = split_tokens(x, groups, sequence_parallel=True)
        assert torch.equal(piece, x[shard.start : shard.stop])
        joined = gather_tokens(piece * (rank + 1), groups, sequence_parallel=True)
        factors = torch.arange(1.0, 5).repeat_interleave(3)[:, None]
        assert torch.equal(joined, x * factors)
        joined.sum().backward()
        assert torch.equal(x.grad, factors.expand_as(x))
        with pytest.raises(UserError, match="a multiple of 4"):
            token_shard(10, groups, sequence_parallel=True)
        causal = causal_shard(12, groups, sequence_parallel=True)
        assert causal.positions(x.device).tolist() == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]][groups.cp.rank()]
        with pytest.raises(UserError, match="a multiple of 4"):
            causal_shard(10, groups, sequence_parallel=True)
        y = torch.ones(1, requires_grad=True)
        count_once(y, groups.cp).backward()
        assert y.grad.item() == 0.5


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_attention_over_context_parallel_ranks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(check_attention, num_ranks, tmp_path, num_ranks)


def test_tokens_over_context_and_sequence_parallel_ranks(tmp_path: Path) -> None:
    run_ranks(check_tokens, 4, tmp_path)
