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
from tqdm import tqdm

from nemo_cosmos.training.checkpoint import METRICS

COLUMNS = ("step", "loss", "lr", "grad_norm", "seconds", "samples_per_s", "peak_memory_mb")
"""`seconds` is the time since the previous row; memory is the GPU's, or the process's where there is none."""


class MetricsWriter(pl.Callback):
    """Appends one row per optimizer step to `metrics.jsonl` and `metrics.csv`; a resumed run cuts off what it repeats.

    A LightningModule may have `step_figures`, a dict of scalars by name for the step just made; they come after the
    columns in `metrics.jsonl`.

    Args:
        directory: The run's folder.
    """

    def __init__(self, directory: str | Path) -> None:
        self._jsonl = Path(directory) / f"{METRICS}.jsonl"
        self._csv = Path(directory) / f"{METRICS}.csv"
        self._last = 0.0
        self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the rows of earlier processes up to the step that is resumed."""
        self._last = time.perf_counter()
        if not trainer.is_global_zero:
            return
        lines = self._jsonl.read_text().splitlines(keepends=True) if self._jsonl.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        rows = [row for row in rows if row["step"] <= trainer.global_step]
        self._jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with self._csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Notes the learning rate; after the step the scheduler has set the next one."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Adds the row of the step just made."""
        if not trainer.is_global_zero:
            return
        row = _row(trainer, lr=self._lr, seconds=time.perf_counter() - self._last)
        self._last = time.perf_counter()
        figures = {name: float(value) for name, value in getattr(pl_module, "step_figures", {}).items()}
        with self._jsonl.open("a") as file:
            file.write(json.dumps(row | figures) + "\n")
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


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


def _metric(trainer: pl.Trainer, name: str) -> float:
    return float(trainer.callback_metrics[name])


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
