"""Embeddings with known near-duplicates."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def clustered(count: int, dim: int, *, seed: int, topics: int = 12) -> np.ndarray:
    """Unit vectors [count, dim] in topics that run into each other, a third of them copies at all small distances."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(topics, dim))
    weights = rng.dirichlet(np.full(topics, 0.5))
    vectors = centres[rng.choice(topics, count, p=weights)] + rng.normal(0, 0.4, (count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = rng.permutation(count)[: count // 3]
    distances = 10 ** rng.uniform(-4, -1, len(copies))
    turned = rng.normal(size=(len(copies), dim))
    sources = vectors[rng.integers(0, count, len(copies))]
    turned -= (turned * sources).sum(1, keepdims=True) * sources
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    cosines = (1 - distances)[:, None]
    vectors[copies] = cosines * sources + np.sqrt(1 - cosines**2) * turned
    return vectors.astype(np.float32)


def brute_force(vectors: np.ndarray, ranks: np.ndarray, metric: str = "cosine") -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest better-ranked vector and its number, by comparing all pairs in double precision."""
    exact = vectors.astype(np.float64)
    if metric == "cosine":
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        distances = 1 - exact @ exact.T
    else:
        distances = np.stack([np.linalg.norm(exact - one, axis=1) for one in exact])
    distances[ranks[None] >= ranks[:, None]] = np.inf
    return distances.min(1), distances.argmin(1)


def write_embeddings(
    folder: Path, vectors: np.ndarray, ids: list[str], pixels: list[int], *, rows_per_file: int = 1000
) -> Path:
    folder.mkdir()
    for start in range(0, len(ids), rows_per_file):
        part = slice(start, start + rows_per_file)
        columns = {
            "id": ids[part],
            "embedding": pa.array(list(vectors[part]), pa.list_(pa.float32())),
            "pixels": pixels[part],
            "duration_s": [2.0] * len(ids[part]),
        }
        pq.write_table(pa.table(columns), folder / f"{start:05d}.parquet")
    return folder


def stand_in_workflow(monkeypatch: pytest.MonkeyPatch, pairs: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """Puts a workflow in the place of NeMo-Curator's, which needs RAPIDS: it writes these pairs as that one would.

    Returns:
        What it will have been given.
    """
    given: dict[str, Any] = {}

    class Workflow:
        def __init__(self, **values: object) -> None:
            given.update(values)

        def run(self) -> None:
            target = Path(given["cache_path"]) / "pairwise_results"
            target.mkdir(parents=True)
            ids, others, similarities = zip(*pairs, strict=True)
            table = pa.table({"id": ids, "max_id": others, "cosine_sim_score": pa.array(similarities)})
            pq.write_table(table, target / "cluster_0.parquet")

    ranking = types.SimpleNamespace(RankingStrategy=lambda columns, ascending: (columns, ascending))
    package = "nemo_curator.stages.deduplication.semantic"
    fake = types.SimpleNamespace(SemanticDeduplicationWorkflow=Workflow, __path__=[])
    monkeypatch.setitem(sys.modules, package, fake)
    monkeypatch.setitem(sys.modules, f"{package}.ranking", ranking)
    return given
