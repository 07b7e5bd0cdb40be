"""Where this rank stands in the pipeline, and running the pipeline without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_cosmos.parallel.pieces import ProcessGroup


def stage_ends(vp_stage: int | None) -> dict[str, bool]:
    """Whether a model chunk of this rank is the first, and the last, of the pipeline.

    Args:
        vp_stage: Virtual stage, where the pipeline is interleaved.

    Returns:
        `pre_process` and `post_process`, as Megatron's models take them.
    """
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    }


def run_stages(
    stage: Callable[[torch.Tensor | None], torch.Tensor],
    group: ProcessGroup,
    *,
    output_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Runs the pipeline's stages one after the other, without gradients.

    Args:
        stage: This rank's; takes what the stage before made, three-dimensional, None on the first, and returns its own,
            on the last the output.
        group: The pipeline-parallel ranks.
        output_shape: Of the output.
        dtype: Of both.
        device: Of this rank.

    Returns:
        The output, on every stage.
    """
    last = group.size() - 1
    received = None
    if group.rank() > 0:
        shape = torch.empty(3, dtype=torch.int64, device=device)
        dist.recv(shape, group=group, group_src=group.rank() - 1)
        received = torch.empty(shape.tolist(), dtype=dtype, device=device)
        dist.recv(received, group=group, group_src=group.rank() - 1)
    result = stage(received).contiguous()
    if group.rank() < last:
        # The stages alone know what crosses, so its shape goes ahead, as in Megatron's schedules.
        dist.send(torch.tensor(result.shape, device=device), group=group, group_dst=group.rank() + 1)
        dist.send(result, group=group, group_dst=group.rank() + 1)
        result = torch.empty(output_shape, dtype=dtype, device=device)
    dist.broadcast(result, group=group, group_src=last)
    return result
