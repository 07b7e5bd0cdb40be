"""What the distributed tests of the DiT compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.dit_step import reference_steps
from tests.distributed.launch import run_ranks


@pytest.fixture(scope="session")
def one_rank_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the losses, gradients, weights and Adam's state of a step of each task on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    run_ranks(reference_steps, 1, folder)
    return folder
