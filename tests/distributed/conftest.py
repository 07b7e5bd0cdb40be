"""What the distributed tests of the transformers compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ar_step import AR
from tests.distributed.dit_step import DIT
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_step import reference_steps


@pytest.fixture(scope="session")
def one_rank_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the losses, gradients, weights and Adam's state of a step of each of the DiT's tasks on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    run_ranks(reference_steps, 1, folder, DIT)
    return folder


@pytest.fixture(scope="session")
def one_rank_ar_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the autoregressive transformer."""
    folder = tmp_path_factory.mktemp("one_rank_ar")
    run_ranks(reference_steps, 1, folder, AR)
    return folder
