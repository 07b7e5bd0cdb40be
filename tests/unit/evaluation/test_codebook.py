from __future__ import annotations

import math

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.codebook import code_bits, codebook_use, count_codes


def test_use_of_a_codebook_has_known_answers():
    even = codebook_use(count_codes(torch.arange(16, dtype=torch.int32).view(1, 2, 2, 4) % 8, 64))
    assert (even.codebook_size, even.num_tokens, even.share_used) == (64, 16, 8 / 64)
    assert even.perplexity == pytest.approx(8)
    alone = codebook_use(count_codes(torch.full((2, 3), 5, dtype=torch.int32), 64))
    assert (alone.share_used, alone.perplexity) == (1 / 64, 1.0)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    uneven = codebook_use(count_codes(torch.tensor([0, 0, 1, 63], dtype=torch.int32), 64))
    assert uneven.perplexity == pytest.approx(2**1.5)


def test_counts_of_videos_add_up():
    first, second = torch.tensor([0, 1, 1]), torch.tensor([1, 3])
    assert (count_codes(first, 4) + count_codes(second, 4)).tolist() == [1, 3, 0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 4]), "0 to 3"),
        (torch.tensor([-1, 2]), "0 to 3"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
    ],
)
def test_indices_of_another_codebook_are_refused(indices, message):
    with pytest.raises(UserError, match=message):
        count_codes(indices, 4)


def test_nothing_has_no_use():
    with pytest.raises(UserError, match="number of tokens"):
        codebook_use(count_codes(torch.zeros(0, dtype=torch.int32), 4))


def test_bits_are_those_of_tokens_or_of_the_stored_dtype():
    assert code_bits(torch.zeros(1, 3, 4, 4, dtype=torch.int32), 64_000) == pytest.approx(48 * math.log2(64_000))
    assert code_bits(torch.zeros(1, 16, 3, 4, 4, dtype=torch.bfloat16), None) == 768 * 16
    assert code_bits(torch.zeros(1, 16, 3, 4, 4), None) == 768 * 32
