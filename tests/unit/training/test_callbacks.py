"""The table of figures per step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_cosmos.training import callbacks
from nemo_cosmos.training.callbacks import MetricsWriter


class Worker(torch.nn.Linear):
    """Adds up tokens and operations."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.work = (0, 0)

    def do(self, tokens: int, flops: int) -> None:
        self.work = (self.work[0] + tokens, self.work[1] + flops)

    def take_work(self) -> tuple[int, int]:
        work, self.work = self.work, (0, 0)
        return work


@pytest.fixture
def trainer() -> SimpleNamespace:
    """On the first of eight ranks."""
    return SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        world_size=8,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        callback_metrics={"reduced_train_loss": 1.0, "grad_norm": 2.0},
        datamodule=SimpleNamespace(data_sampler=SimpleNamespace(global_batch_size=4)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        loggers=[],
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still until it is moved; a matrix multiplication reaches 1e12 operations a second, two ranks have data."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(callbacks, "matmul_flops_per_s", lambda _: 1e12)
    monkeypatch.setattr(callbacks, "AppState", lambda: SimpleNamespace(data_parallel_size=2))
    return now


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_throughput_is_of_all_ranks_and_of_the_step_alone(
    trainer: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path
) -> None:
    writer, worker = MetricsWriter(tmp_path), Worker()
    writer.on_train_start(trainer, worker)
    worker.do(900, 10**13)  # a validation, before the step
    clock.seconds = 3.0
    writer.on_train_batch_start(trainer, worker)
    worker.do(100, 4 * 10**12)
    clock.seconds = 5.0
    trainer.global_step = 1
    writer.on_train_batch_end(trainer, worker)
    [row] = rows(tmp_path)
    assert (row["seconds"], row["samples_per_s"]) == (5.0, 0.8)
    # 2 x 4e12 operations in two seconds by eight ranks.
    assert (row["tokens_per_s"], row["tflops_per_rank"], row["mfu"]) == (100.0, 0.5, 0.5)


def test_rows_of_earlier_steps_outlive_a_resume_that_is_killed(
    trainer: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, worker = MetricsWriter(tmp_path), Worker()
    writer.on_train_start(trainer, worker)
    for trainer.global_step in (1, 2, 3):
        clock.seconds += 1
        writer.on_train_batch_start(trainer, worker)
        clock.seconds += 1
        writer.on_train_batch_end(trainer, worker)
    trainer.global_step = 2

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        writer.on_train_start(trainer, worker)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    writer.on_train_start(trainer, worker)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
