"""Stages that workers can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task

from curator_stages.captioning.captioner import Answer, CaptionRequest
from nemo_cosmos.errors import UserError


@dataclass
class Number(Task[int]):
    process: int = 0

    @property
    def num_items(self) -> int:
        return 1

    def validate(self) -> bool:
        return True


@dataclass
class Numbers(ProcessingStage[EmptyTask, Number]):
    count: int
    name: str = "numbers"

    def process(self, _: EmptyTask) -> list[Number]:
        return [Number(dataset_name="n", data=i) for i in range(self.count)]


@dataclass
class Tell(ProcessingStage[Number, Number]):
    """Tells the process it runs in, and fails or dies when told to."""

    folder: str = ""
    dies_at: int | None = None
    dies_once_at: int | None = None
    fails_at: int | None = None
    sleep_s: float = 0.05
    ends_after_s: float = 0.0
    name: str = "tell"

    def setup(self, _: WorkerMetadata | None = None) -> None:
        if self.fails_at == -1:
            raise UserError("enough")

    def process(self, task: Number) -> Number:
        if self.folder:
            Path(self.folder, f"pid-{os.getpid()}").touch()
        if task.data == self.fails_at:
            raise UserError("enough")
        if task.data == self.dies_at or (task.data == self.dies_once_at and self._first_time()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.sleep_s)
        task.process = os.getpid()
        return task

    def teardown(self) -> None:
        time.sleep(self.ends_after_s)

    def _first_time(self) -> bool:
        mark = Path(self.folder, "died")
        if mark.exists():
            return False
        mark.touch()
        return True


@dataclass
class WaitForAll(ProcessingStage[Number, Number]):
    batch_size: int | None = None
    name: str = "wait_for_all"
    batches: list = field(default_factory=list)

    def process_batch(self, tasks: list[Number]) -> list[Number]:
        self.batches.append(len(tasks))
        return tasks

    def process(self, task: Number) -> Number:
        return task


class DeadlyCaptioner:
    """Kills its process on the clip that the environment names."""

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        deadly = os.environ.get("DEADLY_CLIP")
        if any(request.key.split(":")[0] == deadly for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return {request.key: "seen" for request in requests}
