"""Fixtures for the autoregressive transformer on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_cosmos.parallel import startup


@pytest.fixture
def one_rank() -> Iterator[torch.device]:
    """Megatron's process groups with one rank."""
    with startup.initialize() as device:
        yield device
