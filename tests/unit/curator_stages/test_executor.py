from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task

from curator_stages.executor import InProcessExecutor, make_executor
from nemo_cosmos.errors import UserError


@dataclass
class _Number(Task[int]):
    @property
    def num_items(self) -> int:
        return 1

    def validate(self) -> bool:
        return True


@dataclass
class _Count(ProcessingStage[EmptyTask, _Number]):
    log: list
    name: str = "count"

    def process(self, _: EmptyTask) -> list[_Number]:
        return [_Number(dataset_name="n", data=i) for i in range(5)]

    def teardown(self) -> None:
        self.log.append("down")


@dataclass
class _Square(ProcessingStage[_Number, _Number]):
    log: list
    batch_size: int | None = 1
    name: str = "square"
    batches: list = field(default_factory=list)

    def process(self, task: _Number) -> _Number | None:
        self.log.append(("square", task.data))
        return None if task.data == 3 else _Number(dataset_name="n", data=task.data**2)

    def process_batch(self, tasks: list[_Number]) -> list[_Number]:
        self.batches.append([t.data for t in tasks])
        return super().process_batch(tasks)


@dataclass
class _Collect(ProcessingStage[_Number, _Number]):
    log: list
    fail_at: int | None = None
    name: str = "collect"

    def process(self, task: _Number) -> _Number:
        if task.data == self.fail_at:
            raise UserError("enough")
        self.log.append(("collect", task.data))
        return task


def test_a_task_ends_before_the_next_one_starts() -> None:
    log: list = []
    stages = [_Count(log), _Square(log), _Collect(log)]
    result = Pipeline(name="p", stages=stages).run(InProcessExecutor())
    assert [t.data for t in result] == [0, 1, 4, 16]
    assert log[:4] == [("square", 0), ("collect", 0), ("square", 1), ("collect", 1)]
    assert len({t.task_id for t in result}) == 4


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(2, [[0, 1], [2, 3], [4]]), (None, [[0, 1, 2, 3, 4]])], ids=["two", "all"]
)
def test_batch_size_is_honoured(batch_size: int | None, expected: list) -> None:
    square = _Square([], batch_size=batch_size)
    Pipeline(name="p", stages=[_Count([]), square, _Collect([])]).run(InProcessExecutor())
    assert square.batches == expected


def test_stages_are_torn_down_when_one_fails() -> None:
    log: list = []
    with pytest.raises(UserError, match="enough"):
        Pipeline(name="p", stages=[_Count(log), _Square(log), _Collect(log, fail_at=4)]).run(InProcessExecutor())
    assert log[-1] == "down"


def test_executors_by_name() -> None:
    assert type(make_executor("ray_data")).__name__ == "RayDataExecutor"
    assert type(make_executor("xenna")).__name__ == "XennaExecutor"
    with pytest.raises(UserError, match="slurmish"):
        make_executor("slurmish")
