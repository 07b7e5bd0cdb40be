"""Fully sharded data parallelism: torch's FSDP2 behind the interface of Megatron's data-parallel wrappers.

Each data- and context-parallel rank keeps a piece of every weight, gradient and optimizer state; the weights of a unit
are gathered when it runs. Gradients are averaged over the ranks as Megatron's DDP does.

Megatron's own wrapper around FSDP2 cuts every weight along its first axis, which leaves ranks without a piece of a
short one, and checkpoints describe uneven pieces wrongly. Here a weight is cut along its first axis that divides.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import optimizer as optimizer_checkpoints
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
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
        UserError: A weight cannot be cut into so many pieces, or the pipeline has several stages.
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
        units = [part for part in module.modules() if isinstance(part, module.fsdp_units)]
        for unit in (*units, module):
            fully_shard(
                unit,
                mesh=DeviceMesh.from_group(group, current_device().type),
                shard_placement_fn=lambda parameter: Shard(axes[parameter]),
                mp_policy=precision,
            )
        for name, parameter in module.named_parameters():
            for mark, value in marks[name].items():  # by which Megatron knows what to add up and what to count once
                setattr(parameter, mark, value)
        module.register_load_state_dict_pre_hook(_shard_loaded)
        # Megatron finds a weight's optimizer state by the identity of the weight's piece, which torch makes anew each
        # time it is asked for.
        optimizer_checkpoints.to_local_if_dtensor = local_shard


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


def shard_loaded_state(state: dict[str, Any], parameters: list[torch.Tensor]) -> None:
    """Makes fully sharded tensors of the shards that a checkpoint gave for an optimizer, in place.

    Args:
        state: Of Megatron's float32 or bf16 optimizer, as loaded.
        parameters: Of that optimizer, in its order.
    """
    inner = state.get("optimizer", state)
    for index, moments in inner["state"].items():
        if isinstance(index, int):  # else a step that all parameters share
            inner["state"][index] = {name: _shard_as(parameters[index], moment) for name, moment in moments.items()}
    for group in state.get("fp32_from_fp16_params", []):
        for place, master in enumerate(group):
            group[place] = _shard_as(parameters[0], master)


def _shard_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name, parameter in module.named_parameters():
        if prefix + name in state_dict:
            state_dict[prefix + name] = _shard_as(parameter, state_dict[prefix + name])


def _shard_as(parameter: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or piece.ndim != parameter.ndim or is_sharded(piece):
        return piece
    return DTensor.from_local(piece, parameter.device_mesh, parameter.placements, run_check=False)
