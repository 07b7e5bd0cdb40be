"""Runs of the DiT through Lightning with a pipeline, or fully sharded, train, save and go on as one process does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_cosmos.checkpoints.load import find_network
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from tests.distributed.averages import KeepAverages
from tests.distributed.launch import run_ranks
from tests.unit.diffusion.tiny_run import run

pytestmark = pytest.mark.distributed

BF16 = {"precision": "bf16-mixed"}
LAYOUTS = {
    "PP2": {"pp": 2},
    "PP2 interleaved": {"pp": 2, "vp": 2},
    "FSDP": {"fsdp": "pytorch"},
    "FSDP bf16": {"fsdp": "pytorch", **BF16},
}
EMA_DECAY = 0.5
FIRST, LAST = "step=0000001", "step=0000002"


def _train(rank: int, folder: Path) -> None:
    with pytest.raises(UserError) as refused, pytest.MonkeyPatch.context() as patch:
        patch.delattr(DiffusionModel, "configure_model")
        run(folder / "uneven", config={"uncertainty_channels": 15}, devices=2, fsdp="pytorch")
    (folder / "uneven.txt").write_text(str(refused.value))
    for name, arguments in LAYOUTS.items():
        keep = KeepAverages(folder / name / "averages", 1)
        run(folder / name, steps=1, devices=2, ema_decay=EMA_DECAY, callbacks=[keep], **arguments)
        if rank == 0:
            shutil.copytree(folder / name, folder / f"{name} back", symlinks=True)
        dist.barrier()
        run(folder / name, steps=2, devices=2, ema_decay=EMA_DECAY, **arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs of two steps, the second of which goes on from the first's checkpoint.

    Those of one process, those of two in each layout, and those that one process goes on with after two.
    """
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(_train, 2, folder)
    for name, arguments in {"one": {}, "one bf16": BF16}.items():
        for steps in (1, 2):
            run(folder / name, steps=steps, ema_decay=EMA_DECAY, **arguments)
            startup.shutdown()
    for name, arguments in LAYOUTS.items():
        precision = {"precision": arguments["precision"]} if "precision" in arguments else {}
        run(folder / f"{name} back", steps=2, ema_decay=EMA_DECAY, **precision)
        startup.shutdown()
    return folder


def _figures(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("place", ["", " back"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_save_and_go_on_like_one(runs: Path, name: str, place: str) -> None:
    is_bf16 = "precision" in LAYOUTS[name]
    got, expected = runs / f"{name}{place}", runs / ("one bf16" if is_bf16 else "one")
    assert len(_figures(got)) == len(_figures(expected)) == 2
    for ours, theirs in zip(_figures(got), _figures(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for step in (FIRST, LAST):
        # In bf16 one process saves weights as the model has them. The average is of float32 ones in every layout.
        for use_ema in (True,) if is_bf16 else (False, True):
            ours, theirs = (read_whole(run / "checkpoints" / step, use_ema=use_ema) for run in (got, expected))
            assert set(ours) == set(theirs)
            for name, weight in theirs.items():
                torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_can_compute_with_the_averages(runs: Path, name: str) -> None:
    got, expected = read_whole(runs / name / "averages"), read_whole(runs / name / "checkpoints" / FIRST)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def test_generation_and_conversion_load_what_a_sharded_run_saved(runs: Path) -> None:
    saved = runs / "FSDP" / "checkpoints" / LAST
    with startup.initialize():
        loaded = dict(find_network(saved).load().named_parameters())
    stored = read_whole(saved)
    for name, weight in loaded.items():
        assert torch.equal(weight, stored[name]), name


def test_a_weight_that_cannot_be_cut_evenly_is_refused_before_the_model_is_built(runs: Path) -> None:
    expected = r"data- times context-parallel size: got 2.*logvar_head.linear.weight, whose shape is \(1, 15\)"
    assert re.match(expected, (runs / "uneven.txt").read_text())
