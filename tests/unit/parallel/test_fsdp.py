"""Along which axis a weight is sharded; the rest needs several ranks, see tests/distributed."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.fsdp import shard_axis


@pytest.mark.parametrize(
    ("shape", "ranks", "axis"), [((4096, 256), 64, 0), ((1, 128), 32, 1), ((120, 4096), 64, 1), ((128,), 128, 0)]
)
def test_a_weight_is_sharded_along_its_first_axis_that_divides(shape: tuple[int, ...], ranks: int, axis: int) -> None:
    assert shard_axis("weight", torch.empty(shape, device="meta"), ranks) == axis


def test_a_weight_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"norm.weight, whose shape is \(18,\)"):
        shard_axis("norm.weight", torch.empty(18), 4)
