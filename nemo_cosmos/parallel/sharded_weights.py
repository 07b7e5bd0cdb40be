"""Weights that the ranks share out among themselves and put together block by block (FSDP)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.pieces import ProcessGroup


def shard_weights(network: nn.Module, blocks: Iterable[nn.Module], group: ProcessGroup) -> None:
    """Leaves each rank its share of the weights; a block's are gathered for its forward pass and then freed.

    All ranks of the group must call the network equally often. What stands outside of the blocks is gathered at the
    first call and stays whole.

    Args:
        network: On the CPU or on this rank's device; changed in place, and moved to the device piece by piece.
        blocks: The network's modules that are gathered one at a time.
        group: The ranks that share.

    Raises:
        UserError: There is one rank only.
    """
    if group.size() == 1:
        raise user_error(
            "ranks that share the weights",
            1,
            "2 or more (data-parallel size times context-parallel size)",
            "Start more processes, or do not shard the weights.",
        )
    mesh = DeviceMesh.from_group(group, current_device().type)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
