"""Pieces of a picture on four ranks: what they exchange equals the whole picture on one rank, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_cosmos.parallel.group_norm import SplitGroupNorm
from nemo_cosmos.parallel.halo import exchange_halo
from nemo_cosmos.parallel.pieces import (
    gather,
    gather_result,
    own_piece,
    piece_sizes,
    share,
    sizes_of_ranks,
    sum_and_split,
)
from tests.distributed.launch import run_ranks
from tests.distributed.same import assert_same

pytestmark = pytest.mark.distributed

RANKS = 4
SHAPE = (2, 8, 3, 11, 2)
"""B C T H W."""


def picture(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(memory_format=torch.channels_last_3d)


def whole_and_piece(dim: int, sizes: list[int], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    whole = picture(0, *SHAPE)
    piece = own_piece(whole, dim, group, sizes).clone()
    return whole.requires_grad_(), piece.requires_grad_()


def check_gather(group: dist.ProcessGroup) -> None:
    """Each rank weighs what it has gathered in its own way; on one rank the four weighted sums are one."""
    weights = [picture(1 + rank, *SHAPE).contiguous() for rank in range(RANKS)]
    for dim, sizes in ((1, [2] * 4), (3, piece_sizes(11, RANKS)), (-2, [5, 1, 2, 3])):
        whole, piece = whole_and_piece(dim, sizes, group)
        joined = gather(piece, dim, group, sizes)
        assert torch.equal(joined, whole)
        assert joined.is_contiguous(memory_format=torch.channels_last_3d)
        (joined * weights[group.rank()]).sum().backward()
        sum((whole * weight).sum() for weight in weights).backward()
        assert_same("gathered", piece.grad, own_piece(whole.grad, dim, group, sizes))


def check_gather_result(group: dist.ProcessGroup) -> None:
    sizes = piece_sizes(11, RANKS)
    assert sizes == [3, 3, 3, 2] == sizes_of_ranks(sizes[group.rank()], group, torch.device("cpu"))
    whole, piece = whole_and_piece(3, sizes, group)
    weight = picture(1, *SHAPE)
    joined = gather_result(piece, 3, group, sizes)
    assert torch.equal(joined, whole)
    (joined * weight).sum().backward()
    assert torch.equal(piece.grad, own_piece(weight, 3, group, sizes))


def check_share_and_sum(group: dist.ProcessGroup) -> None:
    """What Megatron's column- and row-parallel layers do, with a product in place of the layer."""
    factors = [picture(1 + rank, *SHAPE) for rank in range(RANKS)]
    weight = picture(9, *SHAPE)
    whole, shared = picture(0, *SHAPE).requires_grad_(), picture(0, *SHAPE).requires_grad_()
    expected = sum(whole * factor for factor in factors)
    got = sum_and_split(share(shared, group) * factors[group.rank()], 1, group)
    assert_same("summed", got, own_piece(expected, 1, group, [2] * 4))
    (got * own_piece(weight, 1, group, [2] * 4)).sum().backward()
    (expected * weight).sum().backward()
    assert_same("shared", shared.grad, whole.grad)


def check_halo(group: dist.ProcessGroup) -> None:
    sizes = [3, 2, 5, 1]  # nobody takes two of the last
    for before, after in ((1, 1), (0, 1), (2, 0), (2, 1)):
        whole, piece = whole_and_piece(3, sizes, group)
        padded = F.pad(whole, (0, 0, before, after))
        start, length = sum(sizes[: group.rank()]), sizes[group.rank()]
        expected = padded.narrow(3, start, before + length + after)
        got = exchange_halo(piece, -2, group, before=before, after=after)
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
        # Every rank's loss is a part of the one loss, as the weighted sums overlap.
        weights = [picture(1 + rank, 2, 8, 3, before + size + after, 2) for rank, size in enumerate(sizes)]
        (got * weights[group.rank()]).sum().backward()
        for rank, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            window = padded.narrow(3, sum(sizes[:rank]), before + size + after)
            (window * weight).sum().backward(retain_graph=True)
        assert_same("halo", piece.grad, own_piece(whole.grad, 3, group, sizes))


def check_group_norm(group: dist.ProcessGroup) -> None:
    """Cut by rows with several channel groups, and by channels with one, around a mean far from zero.

    One rank computes in float64, for torch's own float32 loses three digits there.
    """
    for dim, num_groups, sizes in ((3, 4, piece_sizes(11, RANKS)), (1, 1, [2] * 4)):
        one = nn.GroupNorm(num_groups, SHAPE[1], eps=1e-6)
        many = SplitGroupNorm(num_groups, sizes[group.rank()] if dim == 1 else SHAPE[1], 1e-6, [group])
        with torch.no_grad():
            one.weight.copy_(1 + 0.3 * picture(5, SHAPE[1], 1, 1, 1, 1).flatten())
            one.bias.copy_(picture(6, SHAPE[1], 1, 1, 1, 1).flatten())
            for ours, theirs in ((many.weight, one.weight), (many.bias, one.bias)):
                ours.copy_(own_piece(theirs, 0, group, sizes) if dim == 1 else theirs)
        whole, piece = whole_and_piece(dim, sizes, group)
        shift = 30 * picture(7, SHAPE[0], 1, 1, 1, 1)
        expected, got = one.double()((whole + shift).double()).float(), many(piece + shift)
        # The mean of 30 takes 5 of float32's 24 bits from the spread of 1.
        assert_same("normed", got, own_piece(expected, dim, group, sizes), relative=1e-5)
        weight = picture(8, *SHAPE)
        (expected * weight).sum().backward()
        (got * own_piece(weight, dim, group, sizes)).sum().backward()
        assert_same("norm's input", piece.grad, own_piece(whole.grad, dim, group, sizes), relative=1e-5)
        for ours, theirs in ((many.weight.grad, one.weight.grad), (many.bias.grad, one.bias.grad)):
            if dim == 3:
                dist.all_reduce(ours, group=group)
                assert_same("norm's parameter", ours, theirs, relative=1e-5)
            else:
                assert_same("norm's parameter", ours, own_piece(theirs, 0, group, sizes), relative=1e-5)


CHECKS: list[Callable[[dist.ProcessGroup], None]] = [
    check_gather,
    check_gather_result,
    check_share_and_sum,
    check_halo,
    check_group_norm,
]


def check_all(rank: int, folder: Path) -> None:
    for check in CHECKS:
        check(dist.group.WORLD)


def test_pieces_of_four_ranks_equal_the_whole(tmp_path: Path) -> None:
    run_ranks(check_all, RANKS, tmp_path)
