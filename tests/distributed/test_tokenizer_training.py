"""Runs of the tokenizer through Lightning on two processes train, save and go on as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cosmos.parallel import startup
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.step import TokenizerModel, TokenizerModelConfig
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer
from tests.distributed.launch import run_ranks
from tests.unit.tokenizer.test_step import ClipData

pytestmark = pytest.mark.distributed

ARCHITECTURE = TokenizerConfig(channels=8, channels_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4)
LAYOUTS = {"TP2": {"tp": 2}, "PP2": {"pp": 2}, "CP2": {"cp": 2}}
FIGURES = ("loss", "grad_norm")


def run(folder: Path, *, steps: int, **layout: int) -> None:
    pretrain(
        TokenizerModel(TokenizerModelConfig(architecture=ARCHITECTURE)),
        ClipData(),
        default_trainer(max_steps=steps, **layout),
        log=default_log(folder),
        optim=default_optim(lr=1e-3, max_steps=20),
        resume=default_resume(),
    )
    startup.end_model_parallel()


def run_in_every_layout(rank: int, meeting: Path, folder: Path) -> None:
    for name, sizes in LAYOUTS.items():
        run(folder / name, steps=1, devices=2, **sizes)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_like_one_in_every_layout(tmp_path: Path) -> None:
    for steps in (1, 2):
        run(tmp_path / "one", steps=steps)
        startup.shutdown()
    run_ranks(run_in_every_layout, 2, tmp_path / "meeting", tmp_path)
    for name in LAYOUTS:
        run(tmp_path / name, steps=2)  # one process goes on
        startup.shutdown()
        for ours, theirs in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            for figure in FIGURES:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-5), (name, ours["step"], figure)
