"""The latent cache through NeMo-Curator's executors, with the embedded tokenizer."""

from pathlib import Path

import pytest

from nemo_cosmos.data.latent_cache import LatentCacheConfig, read_cache_card
from nemo_cosmos.errors import UserError
from nemo_cosmos.steps.tokenize import tokenize

CONFIG = LatentCacheConfig(num_frames=17, height=32, width=32, window_stride=8, batch_size=2)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def reference(curated, tmp_path):
    """The cache that one process writes."""
    tokenize(curated, tmp_path / "one", config=CONFIG)
    return _files(tmp_path / "one")


def test_an_array_of_tasks_writes_the_same_cache(curated, tmp_path, reference, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    cards = []
    for task in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        cards.append(tokenize(curated, tmp_path / "array", config=CONFIG))
    assert cards[0] is None
    assert cards[-1] == read_cache_card(tmp_path / "one")
    assert _files(tmp_path / "array") == reference


@pytest.mark.slow
def test_ray_data_writes_the_same_cache(curated, tmp_path, reference):
    tokenize(curated, tmp_path / "ray", config=CONFIG, executor="ray_data")
    assert _files(tmp_path / "ray") == reference


def test_bad_names_are_refused_before_anything_is_written(curated, tmp_path):
    for wrong in ({"executor": "threads"}, {"text_encoder": "none"}, {"tokenizer": "nothing_of_that_name"}):
        with pytest.raises(UserError, match=next(iter(wrong.values()))):
            tokenize(curated, tmp_path / "out", config=CONFIG, **wrong)
    assert not (tmp_path / "out").exists()
