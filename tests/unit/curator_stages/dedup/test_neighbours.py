from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.neighbours import Neighbours, nearest_better
from nemo_cosmos.errors import UserError
from tests.unit.curator_stages.dedup.embeddings import brute_force, clustered

TIGHT = 1e-6
"""Of a cosine in single precision; planted distances keep ten times as far from the threshold."""


def search(vectors: np.ndarray, ranks: np.ndarray, batch: int = 100, **settings: object) -> Neighbours:
    config = SemanticDedupConfig(**{"max_visits": 10_000} | settings)
    batches = [vectors[i : i + batch] for i in range(0, len(vectors), batch)]
    return nearest_better(lambda: batches, ranks, vectors.shape[1], config)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    clusters=st.integers(1, 40),
    eps=st.sampled_from([0.003, 0.01, 0.05]),
    metric=st.sampled_from(["cosine", "l2"]),
)
def test_many_clusters_find_what_brute_force_finds(seed: int, clusters: int, eps: float, metric: str) -> None:
    vectors = clustered(300, 16, seed=seed)
    if metric == "l2":
        vectors *= np.random.default_rng(seed).uniform(0.5, 2, (300, 1)).astype(np.float32)
    ranks = np.random.default_rng(seed).permutation(300)
    found = search(vectors, ranks, eps_to_extract=eps, n_clusters=clusters, sim_metric=metric)
    expected, _ = brute_force(vectors, ranks, metric)
    tolerance = TIGHT if metric == "cosine" else 2e-3  # of the root of a difference near zero
    sure = np.abs(expected - eps) > 10 * tolerance
    assert found.num_cut == 0
    assert np.array_equal((found.distances <= eps)[sure], (expected <= eps)[sure])
    near = sure & (expected <= eps)
    np.testing.assert_allclose(found.distances[near], expected[near], atol=tolerance)


def test_planted_copies_name_the_one_they_were_made_of() -> None:
    originals = clustered(200, 32, seed=1)[:50]
    noise = np.random.default_rng(2).normal(0, 1e-3, originals.shape)
    vectors = np.concatenate([originals + noise, originals]).astype(np.float32)
    ranks = np.concatenate([np.arange(50, 100), np.arange(50)])
    found = search(vectors, ranks, n_clusters=9)
    assert np.array_equal(found.nearest[:50], brute_force(vectors, ranks)[1][:50])
    assert (found.distances[:50] < 1e-4).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 300))
def test_the_order_of_rows_does_not_matter(seed: int, batch: int) -> None:
    vectors, ranks = clustered(300, 16, seed=3), np.random.default_rng(4).permutation(300)
    order = np.random.default_rng(seed).permutation(300)
    plain = search(vectors, ranks, n_clusters=8)
    shuffled = search(vectors[order], ranks[order], batch, n_clusters=8)
    near = plain.distances[order] <= 0.01
    assert np.array_equal(near, shuffled.distances <= 0.01)
    assert np.array_equal(ranks[plain.nearest[order][near]], ranks[order][shuffled.nearest[near]])


def test_of_equal_ones_all_name_the_best() -> None:
    vectors = np.repeat(clustered(20, 8, seed=5), 10, axis=0)
    ranks = np.random.default_rng(6).permutation(200)
    found = search(vectors, ranks, n_clusters=5)
    best = {i: min(range(10 * i, 10 * i + 10), key=lambda row: ranks[row]) for i in range(20)}
    twins = [row for row in range(200) if row != best[row // 10]]
    exact = [row for row in twins if found.distances[row] < TIGHT]
    assert exact == twins
    assert all(np.allclose(vectors[found.nearest[row]], vectors[row], atol=1e-4) for row in twins)
    assert (ranks[found.nearest[twins]] < ranks[twins]).all()


def test_a_small_memory_gives_what_a_large_one_gives() -> None:
    vectors, ranks = clustered(6000, 64, seed=7), np.random.default_rng(8).permutation(6000)
    large = search(vectors, ranks, n_clusters=4, memory_gb=1.0)
    small = search(vectors, ranks, n_clusters=4, memory_gb=0.0013)  # less than the 1.5 MB of embeddings
    # The products are cut into other pieces, so that single precision may round differently.
    np.testing.assert_allclose(small.distances, large.distances, atol=TIGHT)
    assert np.array_equal(small.nearest[small.distances < 0.01], large.nearest[large.distances < 0.01])
    assert np.array_equal(small.clusters, large.clusters)


def test_a_limit_on_visits_is_told() -> None:
    vectors, ranks = clustered(500, 16, seed=9), np.arange(500)
    whole = search(vectors, ranks, n_clusters=40, eps_to_extract=0.05)
    cut = search(vectors, ranks, n_clusters=40, eps_to_extract=0.05, max_visits=1)
    assert whole.num_cut == 0 < cut.num_cut
    assert (cut.distances <= 0.05).sum() < (whole.distances <= 0.05).sum()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_embedding_without_direction_is_named(value: float) -> None:
    vectors = clustered(30, 8, seed=10)
    vectors[17] = value
    with pytest.raises(UserError, match="embedding 17"):
        search(vectors, np.arange(30), batch=7)


def test_too_little_memory_is_refused() -> None:
    vectors = clustered(3000, 64, seed=11)
    with pytest.raises(UserError, match="memory_gb.*at least"):
        search(vectors, np.arange(3000), memory_gb=0.0001)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"eps_to_extract": -0.1}, "eps_to_extract"),
        ({"eps_to_extract": 2.5}, "eps_to_extract"),
        ({"eps_list": ()}, "eps_list"),
        ({"sim_metric": "dot"}, "sim_metric"),
        ({"backend": "tpu"}, "backend"),
        ({"dataframes": "polars"}, "dataframes"),
        ({"max_iter": 0}, "max_iter"),
        ({"memory_gb": 0}, "memory_gb"),
        ({"backend": "gpu", "sim_metric": "l2"}, "sim_metric"),
    ],
)
def test_wrong_settings_are_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        SemanticDedupConfig(**values)
