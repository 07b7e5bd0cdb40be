from pathlib import Path

import pytest

from tests.unit.data.curated_folder import write_curated


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    """A curated folder of five small clips in two shards; clip 3 is held out, clip 4 too short and without actions."""
    return write_curated(tmp_path)
