"""Leaves no process groups behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_cosmos.parallel import startup


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()
