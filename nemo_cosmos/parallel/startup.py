"""Starts and ends process groups for work outside a Lightning trainer: generation, conversion, tests."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from multiprocessing.managers import BaseProxy
from typing import Literal

import torch
import torch.distributed as dist

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.parallel import cpu
from nemo_cosmos.parallel.device import current_device

_STAGE_STRIDE = 100
"""Distance between the seeds of two pipeline stages."""

_ended_groups: list[dist.ProcessGroup] = []
"""Megatron's, of layouts that have ended; still open."""


@contextlib.contextmanager
def initialize(
    *, tensor: int = 1, pipeline: int = 1, context: int = 1, virtual_pipeline: int | None = None, seed: int = 1234
) -> Iterator[torch.device]:
    """Megatron's process groups, for the time of the block: nccl where CUDA is, else gloo.

    A single process needs no launcher; several are started by `torchrun` (or anything that sets its variables). Groups
    that a trainer left open in this process are used when their layout is the same, and left as they were.

    Args:
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        context: Context-parallel size.
        virtual_pipeline: Model chunks per pipeline stage, for the interleaved schedule.
        seed: Of Megatron's random states, and of torch's.

    Yields:
        The device of this rank.

    Raises:
        UserError: The sizes do not fit the number of processes, or other groups are open.
    """
    from megatron.core import parallel_state

    check_layout(world_size(), tensor=tensor, pipeline=pipeline, context=context)
    with contextlib.ExitStack() as stack:
        device = _start_device()
        save_checkpoints_in_process()
        if not dist.is_initialized():
            _start_processes()
            stack.callback(_disconnect)
        if parallel_state.model_parallel_is_initialized():
            _check_open_groups(tensor=tensor, pipeline=pipeline, context=context)
        else:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual_pipeline,
                context_parallel_size=context,
            )
            stack.callback(end_model_parallel)
            close_ended_groups()
        seed_ranks(seed)
        yield device


def shutdown() -> None:
    """Ends whatever groups are open in this process, a trainer's too. Does nothing where none are."""
    end_model_parallel()
    if dist.is_initialized():
        _disconnect()


def end_model_parallel() -> None:
    """Ends Megatron's groups and keeps the processes connected."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        # Megatron forgets its groups without closing them. That waits, for others may not have got everything yet.
        _ended_groups.extend(group for group in parallel_state._global_process_group_list or () if group is not None)
        parallel_state.destroy_model_parallel()


def close_ended_groups() -> None:
    """Frees the threads and sockets of groups that have ended. Call it once new ones are open: all ranks are here."""
    for group in _ended_groups:
        with contextlib.suppress(ValueError):  # closed, by whoever disconnected the processes meanwhile
            dist.destroy_process_group(group)
    _ended_groups.clear()


def _disconnect() -> None:
    dist.destroy_process_group()
    _ended_groups.clear()


def seed_ranks(seed: int, *, te_rng_tracker: bool = False) -> None:
    """Seeds torch and Megatron's random states of this rank; the groups must be open.

    Tensor-parallel ranks differ where Megatron wants them to. Pipeline stages differ, or their layers would start from
    the same weights. Data-parallel ranks are alike.
    """
    from megatron.core import parallel_state, tensor_parallel

    seed += _STAGE_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=te_rng_tracker, force_reset_rng=True)


def run_seed() -> int:
    """Returns the seed that `seed_ranks` was given, which all ranks have in common; without groups torch's own."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return torch.initial_seed()
    return torch.initial_seed() - _STAGE_STRIDE * parallel_state.get_pipeline_model_parallel_rank()


def save_checkpoints_in_process() -> None:
    """Lets Megatron's synchronous checkpoint saves do without their manager process.

    Megatron hands results over through a manager meant for background saves. It costs a second start of the program
    and outlives a run that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # noqa: SLF001 - Megatron's own cache of that queue


def save_next_checkpoint_apart() -> None:
    """Gives the next background save a queue of its own for its results.

    Megatron hands over those of all saves through one queue: where two run at once, it would take the one's for the
    other's.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    former = filesystem_async._results_queue  # noqa: SLF001 - Megatron's own cache of that queue
    if isinstance(former, BaseProxy):
        manager = former._manager  # type: ignore[attr-defined]  # noqa: SLF001 - one process serves all queues
        filesystem_async._results_queue = manager.Queue()  # noqa: SLF001
    else:  # none yet, or that of saves in this process
        filesystem_async._results_queue = None  # noqa: SLF001 - then Megatron makes one


def accelerator() -> Literal["cpu", "gpu"]:
    """Lightning's word for the devices of this machine."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Number of processes of this run, known before the groups are started."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def check_layout(world: int, *, tensor: int, pipeline: int, context: int) -> None:
    """Refuses a layout that does not fit the number of processes.

    Args:
        world: Number of processes.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        context: Context-parallel size.

    Raises:
        UserError: A size is below 1, or the number of processes is not a multiple of their product.
    """
    for name, size in (("tensor", tensor), ("pipeline", pipeline), ("context", context)):
        if size < 1:
            raise user_error(f"{name}-parallel size", size, "1 or more", "Use 1 to switch it off.")
    model_ranks = tensor * pipeline * context
    if world % model_ranks:
        above = -(-world // model_ranks) * model_ranks
        raise user_error(
            "number of processes",
            world,
            f"a multiple of tensor x pipeline x context = {tensor} x {pipeline} x {context} = {model_ranks}",
            f"Start {above} processes, or choose sizes whose product divides {world}.",
        )


def _start_device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.enable()
    return current_device()


def _start_processes() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _check_open_groups(**sizes: int) -> None:
    from megatron.core import parallel_state

    for name, size in sizes.items():
        opened = getattr(parallel_state, f"get_{name}_model_parallel_world_size", None) or getattr(
            parallel_state, f"get_{name}_parallel_world_size"
        )
        if opened() != size:
            raise UserError(
                f"{name}-parallel size {size} was asked for while groups of size {opened()} are open in this process. "
                "End them with nemo_cosmos.parallel.startup.shutdown(), or use another process."
            )
