"""Work that one rank does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_cosmos.errors import UserError

Result = TypeVar("Result")


def is_first_rank() -> bool:
    """Whether this process is the first of the run, or the only one; known also while no groups are open."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Does something on the first rank alone and gives its result to all.

    An error there is raised on all ranks, or the others would wait for one that is gone.

    Args:
        work: Its result must be picklable. Tensors must be on the CPU.

    Raises:
        UserError: The first rank raised it.
        RuntimeError: On the other ranks, where the first one raised any other error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            _broadcast((None, error if isinstance(error, UserError) else RuntimeError(f"on the first rank: {error!r}")))
            raise
        _broadcast((result, None))
        return result
    result, failure = _broadcast(None)
    if failure is not None:
        raise failure
    return result


def _broadcast(message: Any) -> Any:  # noqa: ANN401 - whatever was worked out
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
