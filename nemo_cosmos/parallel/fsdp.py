"""Fully sharded data parallelism: torch's FSDP2 behind the interface of Megatron's data-parallel wrappers.

Each data- and context-parallel rank keeps a piece of every weight, gradient and optimizer state; the weights of a unit
are gathered when it runs. Gradients are averaged over the ranks as Megatron's DDP does.

Megatron's own wrapper around FSDP2 cuts every weight along its first axis, which leaves ranks without a piece of a
short one, and checkpoints describe uneven pieces wrongly. Here a weight is cut along its first axis that divides.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device


class FullyShardedDataParallel(_BaseDataParallel):
    """A model whose weights are sharded over the data- and context-parallel ranks.

    Args:
        config: Of the model; the pipeline must have one stage.
        ddp_config: `grad_reduce_in_fp32` is read.
        module: The model, on its device. Its `fsdp_units` are the types of the submodules that are gathered as one;
            what is in none of them is gathered with the model itself.
        **_: Megatron's DDP has further arguments.

    Raises:
        UserError: A weight cannot be cut into so many pieces, the pipeline has several stages, or the model does not
            say what its units are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        **_: Any,  # noqa: ANN401 - see above
    ) -> None:
        super().__init__(config=config, module=module)
        self.ddp_config = ddp_config
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise user_error(
                "pipeline-parallel size",
                parallel_state.get_pipeline_model_parallel_world_size(),
                "1 with fully sharded weights",
                "Use the distributed optimizer instead, which goes with a pipeline.",
            )
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        axes = {parameter: shard_axis(name, parameter, group.size()) for name, parameter in module.named_parameters()}
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if ddp_config.grad_reduce_in_fp32 else None)
        units = [part for part in module.modules() if isinstance(part, _unit_types(module))]
        mesh = DeviceMesh.from_group(group, current_device().type)
        for unit in (*units, module):
            sharded = fully_shard(
                unit, mesh=mesh, shard_placement_fn=lambda parameter: Shard(axes[parameter]), mp_policy=precision
            )
            # gloo takes no averages: then gradients are summed and divided.
            sharded.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
        for name, parameter in module.named_parameters():
            for mark, value in marks[name].items():  # by which Megatron knows what to add up and what to count once
                setattr(parameter, mark, value)
        module.register_load_state_dict_pre_hook(_shard_loaded)


def _unit_types(module: nn.Module) -> tuple[type[nn.Module], ...]:
    inner: Any = module
    while hasattr(inner, "module"):  # Megatron's wrapper of bf16 models
        inner = inner.module
    if not hasattr(inner, "fsdp_units"):
        raise user_error("fsdp", type(inner).__name__, "a diffusion model", "Use the distributed optimizer instead.")
    return inner.fsdp_units


def shard_axis(name: str, parameter: torch.Tensor, num_pieces: int) -> int:
    """Returns the first axis along which a weight can be cut into equal pieces.

    Raises:
        UserError: There is none.
    """
    for axis, size in enumerate(parameter.shape):
        if size % num_pieces == 0:
            return axis
    raise user_error(
        "data- times context-parallel size",
        num_pieces,
        f"a divisor of an axis of {name}, whose shape is {tuple(parameter.shape)}",
        "Use fewer ranks with fully sharded weights, or the distributed optimizer.",
    )


def is_sharded(parameter: torch.Tensor) -> bool:
    """Tells whether a weight is a shard of a fully sharded one."""
    return isinstance(parameter, DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a fully sharded tensor, always the same object; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # noqa: SLF001 - as Megatron does


def describe_shard(
    key: str, parameter: DTensor, tensor_parallel_axis: int | None, groups: ProcessGroupCollection
) -> ShardedTensor:
    """Describes a shard of a weight for Megatron's distributed checkpoints.

    Args:
        key: Name of the weight.
        parameter: Of a fully sharded model.
        tensor_parallel_axis: Axis along which the tensor-parallel ranks cut it before; None where each has it whole.
        groups: Process groups; `tp` is used.
    """
    [placement], mesh = parameter.placements, parameter.device_mesh
    assert isinstance(placement, Shard)
    rank, size = mesh.get_local_rank(), mesh.size()
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    offsets = {placement.dim: (rank, size)}
    if tensor_parallel_axis == placement.dim:
        offsets = {placement.dim: (tp_rank * size + rank, tp_size * size)}
    elif tensor_parallel_axis is not None:
        offsets[tensor_parallel_axis] = (tp_rank, tp_size)
    return ShardedTensor.from_rank_offsets(
        key,
        local_shard(parameter),
        *((axis, *place) for axis, place in offsets.items()),
        replica_id=(0, tp_rank if tensor_parallel_axis is None else 0, 0),
    )


def write_as_distributed_optimizer(optimizer: MegatronOptimizer) -> None:
    """Lets the optimizer of a fully sharded model read and write the checkpoints of Megatron's distributed optimizer.

    Those (`fully_reshardable`) hold Adam's states in the shapes of the weights, so that any layout can go on from any.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.sharded_state_dict = functools.partial(_sharded_optimizer_state, part)
        part.load_state_dict = functools.partial(_load_optimizer_state, part)


def _sharded_optimizer_state(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> ShardedStateDict:
    adam = optimizer.optimizer
    if is_loading and not adam.state:
        for main in optimizer.get_parameters():
            moments = {name: torch.zeros_like(main) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[main] = {"step": torch.tensor(0.0), **moments}
    entries = {id(entry.data): entry for entry in nested_values(model_state) if isinstance(entry, ShardedTensor)}
    states = {}
    for index, (weight, main) in enumerate(_weights_and_mains(optimizer)):
        entry = entries[id(local_shard(weight))]
        states[index] = {
            name: dataclasses.replace(
                entry, key=f"optimizer.state.{name}.{entry.key}", data=local_shard(tensor), dtype=tensor.dtype
            )
            for name, tensor in _tensors_of(adam, main).items()
        }
    steps = {float(state["step"]) for state in adam.state.values() if "step" in state}
    step = {"step": steps.pop()} if steps else {}
    groups = [{**group, **step} for group in adam.param_groups]
    for group in groups:
        del group["params"]
    return {
        "optimizer": {"param_groups": groups},
        "param_state": states,
        "param_state_sharding_type": "fully_reshardable",
    }


@torch.no_grad()
def _load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    adam = optimizer.optimizer
    kinds = {_kind(group): group for group in loaded["optimizer"]["param_groups"]}
    for group in adam.param_groups:
        saved = kinds[_kind(group)]
        group.update({name: saved[name] for name in group if name != "params" and name in saved})
    for index, (_, main) in enumerate(_weights_and_mains(optimizer)):
        for name, tensor in _tensors_of(adam, main).items():
            local_shard(tensor).copy_(loaded["param_state"][index][name])
        if "step" in adam.state[main]:
            adam.state[main]["step"].fill_(next(iter(kinds.values()))["step"])


def _weights_and_mains(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's weights, and what Adam works on: their float32 masters, or the weights themselves."""
    halves = itertools.chain.from_iterable(getattr(optimizer, "float16_groups", []))
    masters = itertools.chain.from_iterable(getattr(optimizer, "fp32_from_float16_groups", []))
    weight_of = dict(zip(masters, halves, strict=True))
    return ((weight_of.get(main, main), main) for main in optimizer.get_parameters())


def _tensors_of(adam: torch.optim.Optimizer, main: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"param": main.detach(), **{name: tensor for name, tensor in adam.state[main].items() if name != "step"}}


def _kind(group: dict[str, Any]) -> tuple:
    # NeMo puts "pre_" before the names that it has applied.
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys)


def _shard_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name, parameter in module.named_parameters():
        if prefix + name in state_dict:
            state_dict[prefix + name] = _shard_as(parameter, state_dict[prefix + name])


def _shard_as(parameter: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or piece.ndim != parameter.ndim or is_sharded(piece):
        return piece
    return DTensor.from_local(piece, parameter.device_mesh, parameter.placements, run_check=False)
