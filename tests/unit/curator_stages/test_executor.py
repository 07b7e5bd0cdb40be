from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task

from curator_stages import workers
from curator_stages.config import CurationConfig
from curator_stages.executor import InProcessExecutor, make_executor, ray_over_allocation
from curator_stages.pipeline import CurateClips, in_process_workers
from nemo_cosmos.errors import UserError
from tests.unit.curator_stages.worker_stages import Number, Numbers, Tell, WaitForAll


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


def told(tasks: list[Number]) -> dict[int, int]:
    """The process that each number went through."""
    return {task.data: task.process for task in tasks}


def test_workers_share_the_tasks_and_one_that_waits_for_all_is_here(tmp_path: Path) -> None:
    stages = [Numbers(12), Tell(), WaitForAll()]
    result = Pipeline(name="p", stages=stages).run(InProcessExecutor(workers=2))
    processes = told(result)
    assert sorted(processes) == list(range(12))
    assert len(set(processes.values())) == 2 and os.getpid() not in processes.values()
    assert stages[2].batches == [12]
    assert {perf.stage_name for perf in result[0]._stage_perf} == {"numbers", "tell", "wait_for_all"}
    assert not any(_alive(process) for process in processes.values())


def test_a_single_worker_may_be_a_process_of_its_own() -> None:
    (result,) = Pipeline(name="p", stages=[Numbers(1), Tell()]).run(InProcessExecutor(workers=None, apart=True))
    assert result.process not in (0, os.getpid())


def test_a_worker_that_does_not_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_END_S", 0.5)
    started = time.monotonic()
    (result,) = Pipeline(name="p", stages=[Numbers(1), Tell(ends_after_s=300)]).run(InProcessExecutor(apart=True))
    assert time.monotonic() - started < 200
    _wait_until(lambda: not _alive(result.process))


def test_a_worker_that_dies_is_replaced_and_its_task_told(tmp_path: Path) -> None:
    lost: list[tuple[int, str]] = []
    executor = InProcessExecutor(workers=2, on_lost=lambda task, why: lost.append((task.data, why)))
    stages = [Numbers(6), Tell(folder=str(tmp_path), dies_once_at=1, dies_at=4)]
    processes = told(Pipeline(name="p", stages=stages).run(executor))
    assert sorted(processes) == [0, 1, 2, 3, 5]
    assert lost == [(4, "its worker was killed by SIGKILL, twice (out of memory?)")]


def test_a_task_that_kills_its_worker_ends_the_run_where_nobody_is_told() -> None:
    with pytest.raises(RuntimeError, match="killed by SIGKILL, twice"):
        Pipeline(name="p", stages=[Numbers(3), Tell(dies_at=1)]).run(InProcessExecutor(workers=2))


@pytest.mark.parametrize("stage", [Tell(fails_at=2), Tell(fails_at=-1)], ids=["process", "setup"])
def test_what_a_stage_raises_in_a_worker_ends_the_run(stage: Tell) -> None:
    with pytest.raises(UserError, match="enough"):
        Pipeline(name="p", stages=[Numbers(4), stage]).run(InProcessExecutor(workers=2))


def test_workers_go_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
import sys
from nemo_curator.pipeline import Pipeline
from curator_stages.executor import InProcessExecutor
from tests.unit.curator_stages.worker_stages import Numbers, Tell
stages = [Numbers(2), Tell(folder=sys.argv[1], sleep_s=60)]
Pipeline(name="p", stages=stages).run(InProcessExecutor(workers=2))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    _wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    parent.kill()
    parent.wait()
    workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    _wait_until(lambda: not any(_alive(worker) for worker in workers))


def _alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False


def _wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_are_as_many_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    executor = InProcessExecutor(workers=None)
    assert [executor._num_workers(tasks) for tasks in (0, 3, 8, 30, 1000)] == [1, 1, 2, 7, 8]
    assert InProcessExecutor(workers=3)._num_workers(1) == 3


def test_ray_is_started_over_a_slurm_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_curator.core.client import SlurmRayClient

    log: list[str] = []
    monkeypatch.setattr(SlurmRayClient, "start", lambda self: log.append("start"))
    monkeypatch.setattr(SlurmRayClient, "stop", lambda self: log.append("stop"))
    monkeypatch.setenv("SLURM_NNODES", "1")
    with ray_over_allocation("xenna"):
        assert log == []
    monkeypatch.setenv("SLURM_NNODES", "4")
    with ray_over_allocation("in_process"):
        assert log == []
    with ray_over_allocation("xenna"):
        assert log == ["start"]
    assert log == ["start", "stop"]
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with (
        pytest.raises(UserError, match="SLURM_NTASKS: got 8, expected 4, one for each node"),
        ray_over_allocation("xenna"),
    ):
        pass
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with ray_over_allocation("ray_data"):
        assert log == ["start", "stop", "start"]


@pytest.mark.parametrize(
    ("captioner", "device", "expected"),
    [("none", "cpu", None), ("openai:m", "cpu", None), ("transformers:m", "cpu", 1), ("none", "cuda", 1)],
)
def test_models_are_held_once(captioner: str, device: str, expected: int | None) -> None:
    config = CurationConfig(captioner=captioner, device=device)
    assert in_process_workers(config) == expected


@pytest.mark.parametrize(("captioner", "spans"), [("none", 1), ("openai:m", 1), ("transformers:m", 4), ("vllm:m", 4)])
def test_a_model_captions_several_spans_at_once(captioner: str, spans: int) -> None:
    stages = CurateClips(input_dir="in", output_dir="out", config=CurationConfig(captioner=captioner)).decompose()
    assert {stage.name: stage.batch_size for stage in stages}["caption"] == spans
