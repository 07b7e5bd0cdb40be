"""Executors by name: on this machine without Ray, or NeMo-Curator's own on Ray."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nemo_curator.backends.base import BaseExecutor, BaseStageAdapter, NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task
from tqdm import tqdm

from curator_stages.workers import WorkerPool
from nemo_cosmos.errors import user_error

EXECUTORS = ("in_process", "ray_data", "xenna")
OnLost = Callable[[Task, str], None]
"""Told of a task that killed its worker twice, and why."""

_TASKS_PER_WORKER = 4
"""Starting a process takes as long as a few tasks; it pays when there are more."""


class InProcessExecutor(BaseExecutor):
    """Runs a pipeline on this machine, without starting Ray.

    A task runs through all stages before the next one starts, so that memory holds one task's data per worker and
    finished tasks are safe when the process is killed. A stage with a `batch_size` above one waits for that many
    tasks; one with `batch_size` None waits for all of them.

    With several workers the first stage runs here, the ones after it in processes of their own, and those from the
    first stage on that waits for tasks here again. A worker that dies is replaced, and its task is tried once more.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        *,
        progress: bool = False,
        workers: int | None = 1,
        apart: bool = False,
        on_lost: OnLost | None = None,
    ) -> None:
        """Makes the executor.

        Args:
            config: As in every NeMo-Curator executor; unused here.
            progress: Show a bar that counts what the first stage gave.
            workers: Processes; 1 is this one. None is one per core, as far as each has four tasks or more.
            apart: Leave this process alone: a single worker is one of its own too.
            on_lost: Told of tasks whose worker died twice; without it they end the run.
        """
        super().__init__(config)
        self._progress, self._workers, self._apart, self._on_lost = progress, workers, apart, on_lost

    def execute(self, stages: list[ProcessingStage], initial_tasks: list[Task] | None = None) -> list[Task]:
        """Runs the stages and returns the last one's tasks."""
        tasks: Iterable[Task] = initial_tasks or [EmptyTask()]
        with contextlib.ExitStack() as stack:
            tasks = list(_flow(_started(stages[:1], stack)[0], tasks))
            workers = self._num_workers(len(tasks))
            has_pool = workers > 1 or self._apart
            apart = list(itertools.takewhile(lambda stage: stage.batch_size == 1, stages[1:])) if has_pool else []
            with tqdm(total=len(tasks), desc=_title_of(stages), unit="task", disable=not self._progress) as bar:
                if apart:
                    tasks = stack.enter_context(WorkerPool(apart, workers, self._on_lost)).run(tasks, bar.update)
                else:
                    tasks = _counted(tasks, bar)
                for adapter in _started(stages[1 + len(apart) :], stack):
                    tasks = _flow(adapter, tasks)
                return list(tasks)

    def _num_workers(self, num_tasks: int) -> int:
        if self._workers is not None:
            return self._workers
        return max(1, min(len(os.sched_getaffinity(0)), num_tasks // _TASKS_PER_WORKER))


def _started(stages: Sequence[ProcessingStage], stack: contextlib.ExitStack) -> list[BaseStageAdapter]:
    """Sets stages up, and has them torn down with the stack."""
    adapters = []
    for stage in stages:
        adapter = BaseStageAdapter(stage)
        adapter.setup_on_node(NodeInfo(node_id="local"), WorkerMetadata(worker_id="0"))
        adapter.setup(WorkerMetadata(worker_id="0"))
        stack.callback(adapter.teardown)
        adapters.append(adapter)
    return adapters


def _title_of(stages: Sequence[ProcessingStage]) -> str:
    return " to ".join(dict.fromkeys((stages[0].name, stages[-1].name)))


def _flow(adapter: BaseStageAdapter, tasks: Iterable[Task]) -> Iterator[Task]:
    upstream = iter(tasks)
    while batch := list(itertools.islice(upstream, adapter.stage.batch_size)):
        yield from adapter.process_batch(batch)


def _counted(tasks: Iterable[Task], bar: tqdm) -> Iterator[Task]:
    for task in tasks:
        yield task
        bar.update()


def make_executor(
    name: str,
    *,
    progress: bool = False,
    workers: int | None = 1,
    apart: bool = False,
    on_lost: OnLost | None = None,
) -> BaseExecutor:
    """Builds an executor.

    Args:
        name: `in_process`, `ray_data` or `xenna`.
        progress: Show a progress bar; the Ray executors show their own.
        workers: Processes of `in_process`, as `InProcessExecutor` takes them.
        apart: Whether a single worker of `in_process` is a process of its own.
        on_lost: Told of tasks whose worker died twice, by `in_process`.

    Raises:
        UserError: The name is unknown.
    """
    if name == "in_process":
        return InProcessExecutor(progress=progress, workers=workers, apart=apart, on_lost=on_lost)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if name == "ray_data":
        from nemo_curator.backends.ray_data import RayDataExecutor

        return RayDataExecutor()
    if name == "xenna":
        from nemo_curator.backends.xenna import XennaExecutor

        return XennaExecutor({"execution_mode": "streaming", "cpu_allocation_percentage": 1.0, "logging_interval": 60})
    raise user_error("executor", name, f"one of {EXECUTORS}", "Choose one of these.")


@contextlib.contextmanager
def ray_over_allocation(executor: str) -> Iterator[None]:
    """Lets a Ray executor use all nodes of a Slurm allocation, where this program was started on each of them.

    On the first node Ray's head is started and waited for until all nodes have joined; on the others this call ends
    the program when the first node is done. Outside such an allocation nothing happens: the executors start Ray on
    this machine, or take the cluster that `RAY_ADDRESS` names.

    Raises:
        UserError: A node has more than one task: each would start a Ray of its own.
    """
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    if executor == "in_process" or nodes == 1 or "SLURM_ARRAY_TASK_ID" in os.environ:
        yield
        return
    # A step's own numbers, where there are any, count; those of the job may be larger.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or nodes)
    if tasks != nodes:
        raise user_error("SLURM_NTASKS", tasks, f"{nodes}, one for each node", "Submit with --ntasks-per-node=1.")
    from nemo_curator.core.client import SlurmRayClient

    print(f"Ray over {nodes} nodes of Slurm job {os.environ.get('SLURM_JOB_ID')}", file=sys.stderr)
    with SlurmRayClient(include_dashboard=False):
        yield
