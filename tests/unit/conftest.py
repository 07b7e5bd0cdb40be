import types
from pathlib import Path

import pytest

from tests.unit.data.curated_folder import write_curated


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    """A curated folder of five small clips in two shards; clip 3 is held out, clip 4 too short and without actions."""
    return write_curated(tmp_path)


@pytest.fixture
def torchvision_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers resizes the padding mask with torchvision, which is not installed; torch's nearest is the same."""
    import torch
    from diffusers.models.transformers import transformer_cosmos

    functional = types.SimpleNamespace(
        resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size=size, mode="nearest")
    )
    modes = types.SimpleNamespace(NEAREST="nearest")
    stand_in = types.SimpleNamespace(functional=functional, InterpolationMode=modes)
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
