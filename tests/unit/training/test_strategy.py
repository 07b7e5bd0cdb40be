"""What the strategy refuses before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_cosmos.errors import UserError
from nemo_cosmos.training.strategy import CosmosMegatronStrategy
from tests.unit.training.tiny_run import TinyModel, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fsdp": "megatron"}, "fsdp: got 'megatron', expected 'pytorch' or None"),
        ({"pipeline_model_parallel_size": 2}, "pipeline-parallel size: got 2, expected 1 with fsdp"),
        (
            {"num_distributed_optimizer_instances": 2},
            "num_distributed_optimizer_instances: got 2, expected 1 with fsdp",
        ),
        (
            {"ddp": DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)},
            "ddp.overlap_grad_reduce: got True, expected False with fsdp",
        ),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CosmosMegatronStrategy(**{"fsdp": "pytorch", **arguments})


def test_a_sharded_model_is_saved_as_by_the_distributed_optimizer() -> None:
    strategy, model = CosmosMegatronStrategy(fsdp="pytorch"), TinyModel()
    model.optim.config.use_distributed_optimizer = False
    strategy.connect(model)
    assert strategy.sharded_state_dict_metadata["distrib_optim_sharding_type"] == "fully_reshardable"
    model.optim.config.fp16 = True
    with pytest.raises(UserError, match="fp16: got True, expected False with fsdp"):
        strategy.connect(model)


def test_models_without_units_are_refused_before_they_are_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fsdp: got 'pytorch', expected None, for TinyModel cannot be sharded"):
        run(tmp_path, steps=1, fsdp="pytorch")
