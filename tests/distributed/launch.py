"""Starts real processes that talk over gloo, quickly: a fork server imports Megatron and NeMo once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "nemo_cosmos.autoregressive.model",
    "nemo_cosmos.diffusion.model",
    "nemo_cosmos.tokenizer.megatron_model",
    "nemo_cosmos.training.defaults",
]
TIMEOUT_S = 240.0


def run_ranks(function: Callable[..., None], num_ranks: int, folder: Path, *args: Any) -> None:
    """Calls `function(rank, folder, *args)` in `num_ranks` processes with open gloo groups.

    Args:
        function: Of an importable module; it raises to fail the test.
        num_ranks: Number of processes.
        folder: Where the processes find each other and may leave files.
        *args: Handed on; must be picklable.

    Raises:
        AssertionError: A rank failed or hung; the message holds its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    # Not daemons: Megatron writes checkpoints from processes of its own, which daemons may not start.
    ranks = [context.Process(target=_run, args=(function, rank, num_ranks, folder, args)) for rank in range(num_ranks)]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in hung:
            ranks[rank].kill()
    errors = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
    assert not errors and not hung and not any(p.exitcode for p in ranks), "\n".join([f"hung: {hung}", *errors])


def _run(function: Callable[..., None], rank: int, num_ranks: int, folder: Path, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "rendezvous"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        function(rank, folder, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the other ranks may be waiting for this one: nothing can be closed in order
