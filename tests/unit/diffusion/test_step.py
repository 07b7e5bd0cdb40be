"""The training step of the diffusion WFM, through Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.data.shuffle import ShuffledEpochs
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from tests.unit.diffusion.tiny_run import RandomLatents, run, tiny_dit


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


def test_the_logged_loss_does_not_depend_on_the_number_of_micro_batches(tmp_path: Path) -> None:
    one = run(tmp_path / "one", micro_batch_size=4)
    startup.shutdown()
    two = run(tmp_path / "two", micro_batch_size=2)
    assert two == {1: pytest.approx(one[1], rel=1e-5)}


def test_giving_every_frame_as_condition_is_refused() -> None:
    model = DiffusionModel(tiny_dit(), conditioning=ConditioningConfig(min_condition_frames=1, max_condition_frames=2))
    data = RandomLatents(micro_batch_size=1, global_batch_size=1)
    sample = next(iter(torch.utils.data.DataLoader(ShuffledEpochs(data.dataset("train"), num_samples=1, seed=0))))
    with pytest.raises(UserError, match="max_condition_frames: got 2, expected fewer than the 2 latent frames"):
        model.noised(sample)
    model.conditioning = ConditioningConfig(min_condition_frames=1, max_condition_frames=1)
    assert model.noised(sample)["condition_mask"][0, 0, :, 0, 0].tolist() == [1, 0]
