"""When checkpoints are written, and which one a run goes on from.

Checkpoints are folders `step=0000040` with Megatron's distributed checkpoint in `weights/`. While one is written (or
removed) a file `step=0000040-unfinished` stands beside it, so that a process killed at any moment never leaves a half
that looks whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.utils import AppState

METRICS = "metrics"
"""Stem of the files of figures per step in a run's folder."""

_STEP = re.compile(r"step=(\d+)")
_WEIGHTS = Path(nl.AutoResume.WEIGHTS_PATH)
_REQUIRED = (_WEIGHTS / "metadata.json", _WEIGHTS / ".metadata", _WEIGHTS / "common.pt")


def finished_checkpoints(directory: str | Path) -> list[Path]:
    """Lists the whole checkpoints of a run, earliest step first; links to others are left out.

    Args:
        directory: The run's `checkpoints` folder; it need not exist.
    """
    folders = [p for p in Path(directory).glob("*") if p.is_dir() and not p.is_symlink() and _STEP.search(p.name)]
    finished = [
        p
        for p in folders
        if not nl.ModelCheckpoint.is_checkpoint_unfinished(p) and all((p / name).exists() for name in _REQUIRED)
    ]
    return sorted(finished, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint, from its name."""
    match = _STEP.search(checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def steps_made(weights: str | Path) -> int:
    """The number of optimizer steps behind a checkpoint, from what it holds.

    Args:
        weights: The checkpoint's folder `weights`.
    """
    return dist_checkpointing.load_common_state_dict(str(weights)).get("global_step", 0)


class CosmosModelCheckpoint(nl.ModelCheckpoint):
    """NeMo's `ModelCheckpoint`, saving every n steps and always at the end, and keeping the newest.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        keep: How many to keep; -1 keeps all.
    """

    FILENAME = "{step:07d}"
    CHECKPOINT_NAME_LAST = "{step:07d}-last"

    def __init__(self, *, every_n_train_steps: int, keep: int = 2) -> None:
        super().__init__(
            monitor="step",
            mode="max",
            filename=self.FILENAME,
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_train_steps,
            save_optim_on_train_end=True,
            always_save_context=False,
            save_context_on_train_end=False,
            verbose=False,
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves nothing. Lightning's own writes a whole `-last` after each validation, whatever the steps say."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step unless it has just been saved. NeMo's own rule looks at validation, not at steps."""
        if self._last_global_step_saved != trainer.global_step and trainer.global_step > 0:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def nemo_topk_check_previous_run(self) -> None:
        """Takes up the finished checkpoints of the run that is resumed. NeMo's own reads the whole path for numbers."""
        found = finished_checkpoints(self.dirpath)
        self.best_k_models = {f"{path}.ckpt": float(step_of(path)) for path in found}
        if found:
            self.kth_best_model_path, self.best_model_path = f"{found[0]}.ckpt", f"{found[-1]}.ckpt"
            self.kth_value = self.best_k_models[self.kth_best_model_path]
            self.best_model_score = self.best_k_models[self.best_model_path]


class CosmosAutoResume(nl.AutoResume):
    """Goes on from the newest finished checkpoint, from scratch where there is none.

    NeMo's own resumes from `*-last` only, and stops with an error when that one is half-written.
    """

    def checkpoint_in(self, run: str | Path) -> Path | None:
        """Finds the checkpoint that a run goes on from; None where it starts.

        Args:
            run: The run's folder.
        """
        if self.resume_from_path is not None:
            return Path(self.resume_from_path)
        found = finished_checkpoints(self.resume_from_directory or Path(run) / "checkpoints")
        return found[-1] if found else None

    def _find_trainer_ckpt_path(self) -> Path | None:
        return self.checkpoint_in(AppState().log_dir)


@dataclass
class CosmosLogger(nl.NeMoLogger):
    """NeMo's logger; attaching the checkpoint callback does not need nvidia-resiliency-ext, as NeMo's own does."""

    def _setup_trainer_model_checkpoint(
        self, trainer: pl.Trainer, log_dir: Path, ckpt: nl.ModelCheckpoint | None = None
    ) -> None:
        if ckpt is None:
            return
        ckpt.dirpath = ckpt.dirpath or str(log_dir / "checkpoints")
        trainer.callbacks.append(ckpt)

    def _setup_files_to_move(self, log_dir: Path, app_state: AppState) -> None:
        super()._setup_files_to_move(log_dir, app_state)
        # NeMo puts the files of earlier processes away; the metrics go on in one file.
        app_state.files_to_move = [path for path in app_state.files_to_move if path.stem != METRICS]
