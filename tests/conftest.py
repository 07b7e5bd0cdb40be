"""What all tests run under: offline, on CPU, one thread per process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile

# Read by the libraries when they are first imported, hence before pytest collects anything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NEMO_COSMOS_CACHE": tempfile.mkdtemp(prefix="nemo_cosmos_tests_"),  # never the user's own
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import pytest


def pytest_unconfigure() -> None:
    """Removes the cache of text embeddings."""
    shutil.rmtree(os.environ["NEMO_COSMOS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason."""
    if any(item.get_closest_marker("gpu") for item in items):
        _skip_marked(items, "gpu", reason=None if _has_cuda() else "no CUDA device")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    _skip_marked(items, "te", reason=None if has_te else "TransformerEngine is not installed")


def _skip_marked(items: list[pytest.Item], marker: str, *, reason: str | None) -> None:
    for item in items:
        if reason and item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
