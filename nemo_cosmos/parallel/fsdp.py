"""Fully sharded weights by torch's FSDP2: for generation, and behind the interface of Megatron's DDP for training.

Each data- and context-parallel rank keeps a piece of every weight, in training also of gradients and optimizer states;
the weights of a unit are gathered when it runs. Gradients are averaged over the ranks as Megatron's DDP does, and Adam
works on the pieces, which are float32 where the model computes in bf16.

Megatron's own wrapper around FSDP2 cuts every weight along its first axis, which leaves ranks without a piece of a
short one, and checkpoints describe uneven pieces wrongly. Here a weight is cut along its first axis that divides.
"""

from __future__ import annotations

import dataclasses
import functools
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
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.pieces import ProcessGroup
from nemo_cosmos.parallel.startup import keep_open


def shard_weights(module: nn.Module, group: ProcessGroup, *, precision: MixedPrecisionPolicy | None = None) -> None:
    """Leaves each rank of a group its piece of every weight; those of a unit are gathered while it runs.

    All ranks of the group must call the module equally often.

    Args:
        module: On the CPU or on this rank's device; changed in place, and moved to the device unit by unit. Its
            `fsdp_units` are the types of the submodules that are gathered as one; what is in none of them is gathered
            with the module itself.
        group: The ranks that share.
        precision: Of training: what weights are gathered in and gradients added up in. The pieces are then float32.
            Without it they stay as the weights are.

    Raises:
        UserError: The module does not say what its units are.
    """
    marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    # DTensor remembers the outcome of operations by the ranks of a mesh, and with it the first such mesh and its group.
    keep_open(group)
    mesh, unit_types = DeviceMesh.from_group(group, current_device().type), _unit_types(module)
    for unit in (*(part for part in module.modules() if isinstance(part, unit_types)), module):
        for parameter in unit.parameters() if precision is not None else ():
            if not is_sharded(parameter):
                parameter.data = parameter.data.float()
        sharded = fully_shard(
            unit,
            mesh=mesh,
            # Of the module itself too: between a forward pass without gradients and a checkpoint it must be in pieces.
            reshard_after_forward=True,
            # Without an even cut the last ranks have less, or nothing; torch can do that along the first axis only.
            shard_placement_fn=lambda parameter: Shard(shard_axis(parameter.shape, group.size()) or 0),
            mp_policy=precision or MixedPrecisionPolicy(),
        )
        # gloo takes no averages: then gradients are summed and divided.
        sharded.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
    for name, parameter in module.named_parameters():
        for mark, value in marks[name].items():  # by which Megatron knows what to add up and what to count once
            setattr(parameter, mark, value)
    module.register_load_state_dict_pre_hook(_shard_loaded)


class FullyShardedDataParallel(_BaseDataParallel):
    """A model in training whose weights are sharded over the data- and context-parallel ranks.

    Args:
        config: Of the model.
        ddp_config: `grad_reduce_in_fp32` and `check_for_nan_in_grad` are read.
        module: As for `shard_weights`.
        **_: Megatron's DDP has further arguments.

    Raises:
        UserError: A weight cannot be cut into so many equal pieces, or the model does not say what its units are.
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
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        check_pieces(module, group.size())
        precision = MixedPrecisionPolicy(
            param_dtype=next(module.parameters()).dtype,
            reduce_dtype=torch.float32 if ddp_config.grad_reduce_in_fp32 else None,
            cast_forward_inputs=False,  # Megatron's wrapper of bf16 models does what is wanted of it
        )
        shard_weights(module, group, precision=precision)

    def zero_grad_buffer(self) -> None:
        """Forgets the gradients of the step before."""
        for weight in self.parameters():
            weight.main_grad = None

    def finish_grad_sync(self) -> None:
        """Hands the gradients, which are added up by now, to Megatron, and stops the run where they are no numbers."""
        for weight in self.parameters():
            weight.main_grad = weight.grad
        if self.ddp_config.check_for_nan_in_grad:
            gradients = [local_shard(weight.grad) for weight in self.parameters() if weight.grad is not None]
            get_rerun_state_machine().validate_result(
                result=torch.nn.utils.get_total_norm(gradients),
                rejection_func=lambda norm: not torch.isfinite(norm),
                message="gradients of this rank's pieces of the weights are not finite",
                tolerance=0.001,  # between two runs of a step, where Megatron is told to repeat it; as of its DDP
                fatal=True,
            )


def _unit_types(module: nn.Module) -> tuple[type[nn.Module], ...]:
    inner: Any = module
    while hasattr(inner, "module"):  # Megatron's wrapper of bf16 models
        inner = inner.module
    if not hasattr(inner, "fsdp_units"):
        raise user_error("fsdp", type(inner).__name__, "a diffusion model", "Use the distributed optimizer instead.")
    return inner.fsdp_units


def check_pieces(module: nn.Module, num_pieces: int) -> None:
    """Refuses ranks among which a weight cannot be cut evenly, as checkpoints want it.

    Args:
        module: Its weights may be without values, on "meta".
        num_pieces: Number of the ranks.

    Raises:
        UserError: There is such a weight.
    """
    for name, parameter in module.named_parameters():
        if shard_axis(parameter.shape, num_pieces) is None:
            raise user_error(
                "data- times context-parallel size",
                num_pieces,
                f"with fsdp a divisor of an axis of {name}, whose shape is {tuple(parameter.shape)}",
                "Use fewer ranks, a larger tensor-parallel size, or the distributed optimizer alone.",
            )


def shard_axis(shape: torch.Size, num_pieces: int) -> int | None:
    """Returns the first axis along which a weight can be cut into equal pieces; None where there is none."""
    return next((axis for axis, size in enumerate(shape) if size % num_pieces == 0), None)


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
        for weight in optimizer.get_parameters():
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[weight] = {"step": torch.tensor(0.0), **moments}
    entries = {id(entry.data): entry for entry in nested_values(model_state) if isinstance(entry, ShardedTensor)}
    states = {}
    for index, weight in enumerate(optimizer.get_parameters()):
        entry = entries[id(local_shard(weight))]
        states[index] = {
            name: dataclasses.replace(
                entry, key=f"optimizer.state.{name}.{entry.key}", data=local_shard(tensor), dtype=tensor.dtype
            )
            for name, tensor in _tensors_of(adam, weight).items()
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
    for index, weight in enumerate(optimizer.get_parameters()):
        for name, tensor in _tensors_of(adam, weight).items():
            local_shard(tensor).copy_(loaded["param_state"][index][name])
        if "step" in adam.state[weight]:
            adam.state[weight]["step"].fill_(next(iter(kinds.values()))["step"])


def _tensors_of(adam: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"param": weight.detach(), **{name: tensor for name, tensor in adam.state[weight].items() if name != "step"}}


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
