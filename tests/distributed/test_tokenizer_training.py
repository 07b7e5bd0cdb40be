"""The adversarial stage on two ranks makes the steps that one process makes, whatever they share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.tokenizer.adversary import STATE_FILE
from nemo_cosmos.tokenizer.weights import read_tensors
from tests.distributed.launch import run_ranks
from tests.unit.data.curated_folder import write_curated
from tests.unit.tokenizer.tiny_stages import adversary, run

pytestmark = pytest.mark.distributed

STEPS = 3


LAYOUTS = {"DP2": {"micro_batch_size": 1}, "TP2": {"tp": 2}, "CP2": {"cp": 2}}
"""The discriminator is whole on every rank, and sees whole videos."""


def _train_on_two(rank: int, folder: Path, curated: Path) -> None:
    for name, layout in LAYOUTS.items():
        logged = run(
            folder / name, curated, steps=STEPS, judge=adversary(), devices=2, **{"micro_batch_size": 4, **layout}
        )
        (folder / f"{name}_{rank}.json").write_text(json.dumps(logged))
        startup.end_model_parallel()


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    curated = write_curated(tmp_path)
    expected = run(tmp_path / "one", curated, steps=STEPS, judge=adversary(), micro_batch_size=4)
    startup.shutdown()
    run_ranks(_train_on_two, 2, tmp_path, curated)
    for layout in LAYOUTS:
        logged = json.loads((tmp_path / f"{layout}_0.json").read_text())
        for step, figures in expected.items():
            for name, value in figures.items():
                # float32 sums in another order; differences grow by Adam's division from step to step.
                assert logged[str(step)][name] == pytest.approx(value, rel=2e-4, abs=1e-6), (layout, step, name)
        name = f"step={STEPS:07d}"
        one, two = (read_whole(tmp_path / f / "checkpoints" / name) for f in ("one", layout))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
        one, two = (read_tensors(tmp_path / f / "checkpoints" / name / STATE_FILE) for f in ("one", layout))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
