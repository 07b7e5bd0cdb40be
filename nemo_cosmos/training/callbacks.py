"""What a run tells while it runs: a table of figures per step, and a progress bar."""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils import AppState
from tqdm import tqdm

from nemo_cosmos.files import written_aside
from nemo_cosmos.parallel.device import matmul_flops_per_s
from nemo_cosmos.training.checkpoint import METRICS

COLUMNS = ("step", "loss", "lr", "grad_norm", "seconds", "samples_per_s", "peak_memory_mb")
"""`seconds` is the time since the previous row; memory is the GPU's, or the process's where there is none."""

_LOGGED_BY_LIGHTNING = ("step", "loss", "grad_norm")


class MetricsWriter(pl.Callback):
    """Appends one row per optimizer step to `metrics.jsonl` and `metrics.csv`; a resumed run cuts off what it repeats.

    A LightningModule may have `step_figures`, a dict of scalars by name for the step just made; they come after the
    columns in `metrics.jsonl`. It may have `take_work()`, which gives tokens and floating-point operations since its
    last call: then `tokens_per_s`, `tflops_per_rank` and `mfu` come there too, over the time of the step alone. MFU is
    the share of what a large matrix multiplication reached on the first rank's device when training began.

    What Lightning does not log by itself goes to the trainer's loggers as well.

    Args:
        directory: The run's folder.
    """

    def __init__(self, directory: str | Path) -> None:
        self._jsonl = Path(directory) / f"{METRICS}.jsonl"
        self._csv = Path(directory) / f"{METRICS}.csv"
        self._last = self._began = 0.0
        self._lr = 0.0
        self._peak = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the rows of earlier processes up to the step that is resumed."""
        self._last = time.perf_counter()
        if not trainer.is_global_zero:
            return
        if hasattr(pl_module, "take_work"):
            self._peak = matmul_flops_per_s(max(pl_module.parameters(), key=torch.numel).dtype)
        lines = self._jsonl.read_text().splitlines(keepends=True) if self._jsonl.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        rows = [row for row in rows if row["step"] <= trainer.global_step]
        with written_aside(self._jsonl) as aside:  # a kill here must not cost the rows of all earlier steps
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with self._csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Notes the time, and the learning rate; after the step the scheduler has set the next one."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._began = time.perf_counter()
        if hasattr(pl_module, "take_work"):
            pl_module.take_work()  # of a validation

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Adds the row of the step just made."""
        if not trainer.is_global_zero:
            return
        row = _row(trainer, lr=self._lr, seconds=time.perf_counter() - self._last)
        self._last = time.perf_counter()
        figures = {name: float(value) for name, value in getattr(pl_module, "step_figures", {}).items()}
        if hasattr(pl_module, "take_work"):
            seconds = time.perf_counter() - self._began
            figures |= _throughput(*pl_module.take_work(), seconds=seconds, ranks=trainer.world_size, peak=self._peak)
        with self._jsonl.open("a") as file:
            file.write(json.dumps(row | figures) + "\n")
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        for logger in trainer.loggers:
            own = {name: value for name, value in (row | figures).items() if name not in _LOGGED_BY_LIGHTNING}
            logger.log_metrics(own, step=trainer.global_step)


class Progress(pl.Callback):
    """A bar over all optimizer steps. Where the output is no terminal, a line now and then instead.

    Args:
        line_every_s: Least time between two lines where the output is no terminal.
    """

    def __init__(self, *, line_every_s: float = 10.0) -> None:
        self._line_every_s = line_every_s
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar on the first rank."""
        if trainer.is_global_zero:
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc="training",
                unit="step",
                mininterval=0.1 if terminal else self._line_every_s,
                dynamic_ncols=terminal,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Moves the bar."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{_metric(trainer, 'reduced_train_loss'):.4f}", refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes the bar, also when training ended by an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _row(trainer: pl.Trainer, *, lr: float, seconds: float) -> dict[str, float]:
    samples = trainer.datamodule.data_sampler.global_batch_size
    return {
        "step": trainer.global_step,
        "loss": _metric(trainer, "reduced_train_loss"),
        "lr": lr,
        "grad_norm": _metric(trainer, "grad_norm"),
        "seconds": round(seconds, 4),
        "samples_per_s": round(samples / seconds, 3),
        "peak_memory_mb": round(_peak_memory_mb(trainer.strategy.root_device), 1),
    }


def _throughput(tokens: int, flops: int, *, seconds: float, ranks: int, peak: float) -> dict[str, float]:
    """Of all ranks, from the work of the first data-parallel one: the others have about as much."""
    data_parallel = AppState().data_parallel_size
    flops_per_s = flops * data_parallel / ranks / seconds
    return {
        "tokens_per_s": round(tokens * data_parallel / seconds, 1),
        "tflops_per_rank": round(flops_per_s / 1e12, 6),
        "mfu": round(flops_per_s / peak, 4),
    }


def _metric(trainer: pl.Trainer, name: str) -> float:
    return float(trainer.callback_metrics[name])


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
