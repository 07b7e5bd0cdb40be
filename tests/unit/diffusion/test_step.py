"""The training step of the diffusion WFM, through Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cosmos.parallel import startup
from tests.unit.diffusion.tiny_run import run


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


def test_the_logged_loss_does_not_depend_on_the_number_of_micro_batches(tmp_path: Path) -> None:
    one = run(tmp_path / "one", micro_batch_size=4)
    startup.shutdown()
    two = run(tmp_path / "two", micro_batch_size=2)
    assert two == {1: pytest.approx(one[1], rel=1e-5)}
