"""The adversarial stage on two data-parallel ranks makes the steps that one process makes."""

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


def _train_on_two(rank: int, folder: Path, curated: Path) -> None:
    logged = run(folder / "two", curated, steps=STEPS, judge=adversary(), micro_batch_size=1, devices=2)
    (folder / f"logged_{rank}.json").write_text(json.dumps(logged))


def test_two_ranks_with_more_micro_batches_train_like_one(tmp_path: Path) -> None:
    curated = write_curated(tmp_path)
    expected = run(tmp_path / "one", curated, steps=STEPS, judge=adversary(), micro_batch_size=4)
    startup.shutdown()
    run_ranks(_train_on_two, 2, tmp_path, curated)
    logged = json.loads((tmp_path / "logged_0.json").read_text())
    for step, figures in expected.items():
        for name, value in figures.items():
            # float32 sums over samples in another order; differences grow by Adam's division from step to step.
            assert logged[str(step)][name] == pytest.approx(value, rel=2e-4, abs=1e-6), (step, name)
    name = f"step={STEPS:07d}"
    one, two = (read_whole(tmp_path / f / "checkpoints" / name) for f in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
    one, two = (read_tensors(tmp_path / f / "checkpoints" / name / STATE_FILE) for f in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
