"""Training sees the same global batches of a latent cache on any number of ranks, and goes on in mid-epoch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from nemo_cosmos.data import datamodule
from nemo_cosmos.data.datamodule import LatentDataModule
from tests.unit.data.test_latent_cache import _write
from tests.unit.diffusion.tiny_run import RandomLatents

STEPS, GLOBAL_BATCH_SIZE = 5, 4
"""Nine samples are an epoch, so steps 3 and 5 have samples of two."""


@pytest.fixture
def cache(curated: Path, tmp_path: Path) -> Path:
    _write(curated, tmp_path / "latents")
    return tmp_path / "latents"


def read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, *, ranks: int, state: dict | None = None
) -> tuple[list[dict[int, torch.Tensor]], dict]:
    """Reads on from a state with one rank after the other; gives the latents of each step, and the state after two."""
    steps, states = [{} for _ in range(STEPS)], []
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        module = LatentDataModule(str(cache), micro_batch_size=1, global_batch_size=GLOBAL_BATCH_SIZE, seed=3)
        first_step = 0
        if state is not None:
            module.load_state_dict(state)
            first_step = state["consumed_samples"] // GLOBAL_BATCH_SIZE
        module.trainer = SimpleNamespace(max_steps=STEPS, global_step=first_step)
        module.data_sampler.connect(module.trainer)
        loader = module.data_sampler.transform_dataloader(module.train_dataloader())
        for number, batch in enumerate(loader):
            items = batch[0] if isinstance(batch, tuple) else batch
            step = first_step + number * ranks // GLOBAL_BATCH_SIZE
            steps[step] |= {int(i): latent for i, latent in zip(items["draw_id"], items["latent"], strict=True)}
        module.trainer.global_step = 2
        states.append(module.state_dict())
    assert all(each == states[0] for each in states)
    return steps, states[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_global_batches_are_those_of_one_rank_before_and_after_a_resume(
    cache: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    expected, state = read(cache, monkeypatch, ranks=1)
    assert state == {"consumed_samples": 2 * GLOBAL_BATCH_SIZE}
    got, same_state = read(cache, monkeypatch, ranks=ranks)
    assert same_state == state
    # What ranks have read by step 2, one goes on from, and the other way round.
    on_one, on_many = (read(cache, monkeypatch, ranks=n, state=state)[0] for n in (1, ranks))
    assert on_one[:2] == on_many[:2] == [{}, {}]
    for steps, first in ((got, 0), (on_one, 2), (on_many, 2)):
        for step in range(first, STEPS):
            assert sorted(steps[step]) == list(range(step * GLOBAL_BATCH_SIZE, (step + 1) * GLOBAL_BATCH_SIZE))
            assert all(torch.equal(latent, expected[step][i]) for i, latent in steps[step].items())
    assert len({float(latent.sum()) for step in expected for latent in step.values()}) == 9


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("gpu", True)])
def test_batches_are_pinned_for_gpus(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "accelerator", lambda: device)
    data = RandomLatents(micro_batch_size=1, global_batch_size=1)
    assert data._loader(data.dataset("train"), mode="train").pin_memory is pinned
