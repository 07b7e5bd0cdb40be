"""Executors by name: in this process, or NeMo-Curator's own on Ray."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from nemo_curator.backends.base import BaseExecutor, BaseStageAdapter, NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task
from tqdm import tqdm

from nemo_cosmos.errors import user_error

EXECUTORS = ("in_process", "ray_data", "xenna")


class InProcessExecutor(BaseExecutor):
    """Runs a pipeline in this process, without starting Ray.

    A task runs through all stages before the next one starts, so that memory holds one task's data and finished
    tasks are safe when the process is killed. A stage with a `batch_size` above one waits for that many tasks; one
    with `batch_size` None waits for all of them.
    """

    def __init__(self, config: dict[str, Any] | None = None, *, progress: bool = False) -> None:
        """Makes the executor.

        Args:
            config: As in every NeMo-Curator executor; unused here.
            progress: Show a bar that counts what the first stage gave.
        """
        super().__init__(config)
        self._progress = progress

    def execute(self, stages: list[ProcessingStage], initial_tasks: list[Task] | None = None) -> list[Task]:
        """Runs the stages and returns the last one's tasks."""
        adapters = [BaseStageAdapter(stage) for stage in stages]
        tasks: Iterable[Task] = initial_tasks or [EmptyTask()]
        started: list[BaseStageAdapter] = []
        try:
            for position, adapter in enumerate(adapters):
                adapter.setup_on_node(NodeInfo(node_id="local"), WorkerMetadata(worker_id="0"))
                adapter.setup(WorkerMetadata(worker_id="0"))
                started.append(adapter)
                tasks = _flow(adapter, tasks)
                if position == 0 and self._progress:
                    tasks = tqdm(list(tasks), desc=stages[0].name, unit="task", file=sys.stderr)
            return list(tasks)
        finally:
            for adapter in started:
                adapter.teardown()


def _flow(adapter: BaseStageAdapter, tasks: Iterable[Task]) -> Iterator[Task]:
    upstream = iter(tasks)
    while batch := list(itertools.islice(upstream, adapter.stage.batch_size)):
        yield from adapter.process_batch(batch)


def make_executor(name: str, *, progress: bool = False) -> BaseExecutor:
    """Builds an executor.

    Args:
        name: `in_process`, `ray_data` or `xenna`.
        progress: Show a progress bar; the Ray executors show their own.

    Raises:
        UserError: The name is unknown.
    """
    if name == "in_process":
        return InProcessExecutor(progress=progress)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if name == "ray_data":
        from nemo_curator.backends.ray_data import RayDataExecutor

        return RayDataExecutor()
    if name == "xenna":
        from nemo_curator.backends.xenna import XennaExecutor

        return XennaExecutor({"execution_mode": "streaming", "cpu_allocation_percentage": 1.0, "logging_interval": 60})
    raise user_error("executor", name, f"one of {EXECUTORS}", "Choose one of these.")
