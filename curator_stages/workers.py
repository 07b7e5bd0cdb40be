"""Processes that run the stages of a pipeline beside each other, a task at a time each."""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self

from nemo_curator.backends.base import BaseStageAdapter, NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import Task

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}
"""Workers share the cores by tasks."""
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    "MALLOC_ARENA_MAX": "1",  # what a thread that decodes took stays there too
}
"""glibc holds on to what a task's frames took, but for the largest arrays: to give it back and take it anew costs as
much as to decode them. What the user has set counts."""

_PARENT_CHECK_S = 0.2
_END_S = 60.0
"""For a worker's stages to be torn down, and for a file system to let go of its threads."""


class WorkerPool:
    """Runs stages in several processes; used as a context, at whose end the processes are gone."""

    def __init__(
        self, stages: Sequence[ProcessingStage], count: int, on_lost: Callable[[Task, str], None] | None = None
    ) -> None:
        """Names the stages; processes start with `run`.

        Args:
            stages: Each with a batch size of 1.
            count: Number of processes.
            on_lost: Told of a task that killed its worker twice, and why; without it such a task ends the run.
        """
        self._setup = pickle.dumps(list(stages))
        self._environment = _KEEP_MEMORY | os.environ | (_ONE_THREAD if count > 1 else {})
        self._count, self._on_lost = count, on_lost
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.end(at_once=kind is not None)

    def run(self, tasks: Sequence[Task], done: Callable[[], object]) -> Iterator[Task]:
        """Gives the results of tasks as they are ready.

        Args:
            tasks: What to do; a worker is given the next one when it has done its last one.
            done: Called after each task.

        Raises:
            Exception: What a stage raised.
            RuntimeError: A worker died twice on one task, and nobody is to be told.
        """
        queue = collections.deque((task, 0) for task in tasks)
        for _ in range(min(self._count, len(queue))):
            self._start().give(*queue.popleft())
        while busy := [worker for worker in self._workers if worker.task is not None]:
            ready = wait([worker.connection for worker in busy])
            for worker in [w for w in busy if w.connection in ready]:
                assert worker.task is not None
                task, deaths = worker.task
                try:
                    yield from worker.result()
                    done()
                except (EOFError, ConnectionResetError):
                    self._workers.remove(worker)
                    words = worker.last_words()
                    if deaths == 0:
                        queue.appendleft((task, 1))
                    else:
                        self._lose(task, words)
                        done()
                    if queue:
                        worker = self._start()
                if queue:
                    worker.give(*queue.popleft())

    def _start(self) -> _Worker:
        worker = _Worker(self._setup, self._environment)
        self._workers.append(worker)
        return worker

    def _lose(self, task: Task, why: str) -> None:
        if self._on_lost is None:
            raise RuntimeError(f"task {task.task_id}: {why}")
        self._on_lost(task, why)


class _Worker:
    """The parent's side of one process."""

    def __init__(self, setup: bytes, environment: dict[str, str]) -> None:
        self.task: tuple[Task, int] | None = None
        self.connection, theirs = multiprocessing.Pipe()
        # Not by `multiprocessing`: that would run the user's main script once more in every process.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "curator_stages.workers", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            env=environment | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        theirs.close()
        self.connection.send_bytes(setup)

    def give(self, task: Task, deaths: int) -> None:
        """Starts a task, whose workers have died `deaths` times."""
        self.task = (task, deaths)
        # A worker that has died meanwhile is noticed when its result is asked for.
        try:
            self.connection.send(task)
        except BrokenPipeError:
            return

    def result(self) -> list[Task]:
        """Waits for the result; raises what the stages raised, or EOFError when the process is dead."""
        results = self.connection.recv()
        self.task = None
        if isinstance(results, BaseException):
            raise results
        return results

    def last_words(self) -> str:
        """Says how the process ended."""
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its worker {how}, twice" + (" (out of memory?)" if code == -signal.SIGKILL else "")

    def end(self, *, at_once: bool) -> None:
        """Ends the process, after its stages are torn down or at once; one that does not end is left to the system."""
        self.connection.close()
        if at_once:
            self._process.kill()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _serve(connection: Connection, parent: int) -> None:
    """The process's side: takes the stages, then task after task, until the parent closes or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    try:
        adapters = [BaseStageAdapter(stage) for stage in pickle.loads(connection.recv_bytes())]
        failure: Exception | None = None
        try:
            for adapter in adapters:
                adapter.setup_on_node(NodeInfo(node_id="local"), WorkerMetadata(worker_id=str(os.getpid())))
                adapter.setup(WorkerMetadata(worker_id=str(os.getpid())))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            failure = error
        while True:
            tasks = [connection.recv()]
            answer: list[Task] | Exception
            try:
                if failure is not None:
                    raise failure
                for adapter in adapters:
                    tasks = [result for task in tasks for result in adapter.process_batch([task])]
                answer = tasks
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        for adapter in adapters:
            adapter.teardown()


def _watch(parent: int) -> None:
    """Ends a worker whose parent was killed, in the middle of a task too."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    from loguru import logger

    logger.disable("nemo_curator")
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
