"""How weights are sharded; the rest needs several ranks, see tests/distributed."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.fsdp import FullyShardedDataParallel, check_pieces, is_sharded, local_shard, shard_axis


@pytest.mark.parametrize(
    ("shape", "ranks", "axis"),
    [((4096, 256), 64, 0), ((1, 128), 32, 1), ((120, 4096), 64, 1), ((128,), 128, 0), ((18,), 4, None)],
)
def test_a_weight_is_sharded_along_its_first_axis_that_divides(
    shape: tuple[int, ...], ranks: int, axis: int | None
) -> None:
    assert shard_axis(torch.Size(shape), ranks) == axis


def test_a_weight_that_does_not_divide_is_named() -> None:
    module = torch.nn.Linear(12, 18, device="meta")
    check_pieces(module, 9)
    with pytest.raises(UserError, match=r"bias, whose shape is \(18,\)"):
        check_pieces(module, 4)


class _Unit(torch.nn.Linear):
    pass


class _Model(torch.nn.Sequential):
    fsdp_units = (_Unit,)


def test_bf16_weights_have_float32_pieces_and_gradients_must_be_numbers() -> None:
    with startup.initialize():
        model = _Model(_Unit(4, 4), torch.nn.Linear(4, 2)).bfloat16()
        inputs = torch.randn(3, 4).bfloat16()
        expected = model(inputs)
        wrapped = FullyShardedDataParallel(None, DistributedDataParallelConfig(check_for_nan_in_grad=True), model)
        with torch.no_grad():
            assert torch.equal(wrapped(inputs), expected)
        # Validation may end here, and a checkpoint be saved.
        assert all(is_sharded(weight) for weight in wrapped.parameters())
        wrapped(inputs).sum().backward()
        wrapped.finish_grad_sync()
        for weight in wrapped.parameters():
            assert {weight.dtype, weight.main_grad.dtype} == {torch.float32}
        local_shard(next(wrapped.parameters()).grad).fill_(torch.nan)
        with pytest.raises(RuntimeError, match="gradients of this rank's pieces of the weights are not finite"):
            wrapped.finish_grad_sync()
