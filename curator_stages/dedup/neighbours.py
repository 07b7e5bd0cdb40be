"""For every embedding the nearest one of those that would rather be kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.kmeans import Partition, train_centroids
from curator_stages.dedup.scratch import ClusterFiles, Piece
from nemo_cosmos.errors import user_error

Batches = Callable[[], Iterable[np.ndarray]]
"""Gives all embeddings, in the same order at every call: float32 [n, D] each, together N."""

_SAMPLE_PER_CLUSTER = 64
_QUERIES_AT_ONCE = 512


class PairRules:
    """Which embeddings may be held against each other, and how strictly; without any, all may."""

    def penalties(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray | None:
        """Returns what to add to distances [len(rows), len(others)], infinity for never; None for nothing at all."""
        return None


@dataclass(frozen=True)
class Neighbours:
    """The nearest better-ranked embedding of each, among those that it was compared with."""

    distances: np.ndarray
    """float32 [N], penalties included; infinite where there is none."""
    nearest: np.ndarray
    """int64 [N]; its number, -1 where there is none."""
    clusters: np.ndarray
    """int32 [N]."""
    num_cut: int
    """Embeddings that were not compared on all sides, because of `max_visits`."""


def nearest_better(
    batches: Batches,
    ranks: np.ndarray,
    dim: int,
    config: SemanticDedupConfig,
    *,
    rules: PairRules | None = None,
    scratch: str | Path | None = None,
    held_bytes: int = 0,
) -> Neighbours:
    """Finds, for every embedding, the nearest one with a better rank.

    Distances up to `config.eps_to_extract` are found without loss; greater ones may be missed across clusters.

    Args:
        batches: Gives the embeddings. They need no norm: `cosine` scales them here.
        ranks: int [N], a permutation; 0 is what is kept in any case.
        dim: D.
        config: Settings.
        rules: Of pairs that are not compared plainly.
        scratch: Folder for temporary files: each embedding once, and once more per border that it is near.
        held_bytes: What the caller holds of them in memory, such as ids; part of `memory_gb` as well.

    Raises:
        UserError: `memory_gb` is too little, an embedding is not finite, or it has no direction to compare by.
    """
    count = len(ranks)
    plan = _Plan.of(count, dim, config, held_bytes)
    runs = _runs(batches, plan.run_rows, dim, config.sim_metric == "cosine")
    sample = _sample(runs(), ranks, plan.sample_rows, config.seed)
    clusters = config.num_clusters(count)
    centroids = (
        sample[:1]
        if clusters == 1
        else train_centroids(sample, clusters, max_iter=config.max_iter, spherical=config.sim_metric == "cosine")
    )
    del sample
    partition = Partition(centroids, reach=config.reach, max_visits=config.max_visits)
    with tempfile.TemporaryDirectory(prefix="dedup.", dir=scratch) as folder:
        search = _Search(ranks, partition, plan, config.sim_metric, rules or PairRules(), Path(folder))
        for first_row, embeddings in runs():
            search.add(first_row, embeddings)
        return search.run()


@dataclass(frozen=True)
class _Plan:
    """How many embeddings each step holds at once."""

    run_rows: int
    sample_rows: int
    piece_rows: int
    visit_rows: int

    @classmethod
    def of(cls, count: int, dim: int, config: SemanticDedupConfig, held_bytes: int) -> _Plan:
        clusters = config.num_clusters(count)
        row = 4 * dim + 8
        least = least_memory_gb(count, dim, clusters) + held_bytes / 1e9
        if config.memory_gb < least:
            expected = f"at least {least:.2f} for {count:,} embeddings of {dim} numbers in {clusters:,} clusters"
            raise user_error("memory_gb", config.memory_gb, expected, "Give more, or fewer n_clusters.")
        budget = config.memory_gb * 1e9 - held_bytes - _fixed_bytes(count, dim, clusters)
        return cls(
            run_rows=min(count, int(budget / 3 / row)),
            sample_rows=min(count, _SAMPLE_PER_CLUSTER * clusters),
            piece_rows=int(budget / 6 / row),
            visit_rows=max(64, min(8192, int(budget / 6 / (16 * clusters)))),
        )


def least_memory_gb(count: int, dim: int, clusters: int) -> float:
    """Returns the least `memory_gb` that so many embeddings of `dim` numbers can be compared with."""
    row = 4 * dim + 8
    return (_fixed_bytes(count, dim, clusters) + 2 * row * max(_SAMPLE_PER_CLUSTER * clusters, 1024)) / 1e9


def _fixed_bytes(count: int, dim: int, clusters: int) -> int:
    """Counts each embedding's rank, place in the draw, and what is found; then centroids and their distances."""
    return 64 * count + (12 * dim + 12 * clusters) * clusters


def _runs(batches: Batches, most: int, dim: int, unit: bool) -> Callable[[], Iterable[tuple[int, np.ndarray]]]:
    """Gives embeddings in runs of `most`, checked and ready to compare, each with its first one's number.

    A run is to be read before the next one is asked for: all stand in the same memory.
    """

    def give() -> Iterable[tuple[int, np.ndarray]]:
        held = np.empty((most, dim), np.float32)
        done, count = 0, 0
        for batch in batches():
            for start in range(0, len(batch), most):
                part = _checked(batch[start : start + most], done + count, unit)
                if count + len(part) > most:
                    yield done, held[:count]
                    done, count = done + count, 0
                held[count : count + len(part)] = part
                count += len(part)
        if count:
            yield done, held[:count]

    return give


def _checked(batch: np.ndarray, first_row: int, unit: bool) -> np.ndarray:
    batch = np.ascontiguousarray(batch, np.float32)
    norms = np.linalg.norm(batch, axis=1)
    wrong = np.flatnonzero(~np.isfinite(norms) | (unit & (norms == 0)))
    if len(wrong):
        raise user_error(
            f"embedding {first_row + wrong[0]}", f"norm {norms[wrong[0]]}", "finite numbers, not all zero", "Remove it."
        )
    return batch / norms[:, None] if unit else batch


def _sample(runs: Iterable[tuple[int, np.ndarray]], ranks: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws embeddings by their rank, and gives them in the order of the draw, whatever order they are stored in."""
    drawn = np.full(len(ranks), -1, np.int32)
    drawn[np.random.default_rng(seed).permutation(len(ranks))[:count]] = np.arange(count)
    sample = None
    for first_row, embeddings in runs:
        if sample is None:
            sample = np.empty((count, embeddings.shape[1]), np.float32)
        places = drawn[ranks[first_row : first_row + len(embeddings)]]
        chosen = places >= 0
        sample[places[chosen]] = embeddings[chosen]
    assert sample is not None
    return sample


class _Search:
    """Comparison cluster by cluster."""

    def __init__(
        self, ranks: np.ndarray, partition: Partition, plan: _Plan, metric: str, rules: PairRules, folder: Path
    ) -> None:
        self._ranks, self._partition, self._plan, self._rules = ranks, partition, plan, rules
        self._compare = _cosine_distances if metric == "cosine" else _l2_distances
        self._num_clusters, dim = partition.centroids.shape
        self._members = ClusterFiles(folder / "members", self._num_clusters, dim)
        self._visitors = ClusterFiles(folder / "visitors", self._num_clusters, dim)
        self._distances = np.full(len(ranks), np.inf, np.float32)
        self._nearest = np.full(len(ranks), -1, np.int64)
        self._clusters = np.empty(len(ranks), np.int32)
        self._num_cut = 0

    def add(self, first_row: int, embeddings: np.ndarray) -> None:
        """Sorts a run into the clusters."""
        rows = np.arange(first_row, first_row + len(embeddings))
        visitors, visited = [], []
        for start in range(0, len(embeddings), self._plan.visit_rows):
            visits = self._partition.visits(embeddings[start : start + self._plan.visit_rows])
            self._clusters[first_row + start : first_row + start + len(visits.home)] = visits.home
            visitors.append(visits.rows + start)
            visited.append(visits.clusters)
            self._num_cut += visits.num_cut
        home = self._clusters[rows]
        self._members.append(embeddings, rows, home, np.arange(len(rows)))
        self._visitors.append(embeddings, rows, np.concatenate(visited), np.concatenate(visitors))

    def run(self) -> Neighbours:
        """Compares the members of every cluster with each other, and its visitors with them."""
        for cluster in range(self._num_clusters):
            for members in self._members.pieces(cluster, self._plan.piece_rows, self._ranks):
                for files in (self._members, self._visitors):
                    for queries in files.pieces(cluster, self._plan.piece_rows, self._ranks):
                        self._update(queries, members, self._partition.centroids[cluster])
        return Neighbours(self._distances, self._nearest, self._clusters, self._num_cut)

    def _update(self, queries: Piece, members: Piece, centre: np.ndarray) -> None:
        for start in range(0, len(queries.rows), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            rows, ranks = queries.rows[part], queries.ranks[part]
            better = int(np.searchsorted(members.ranks, ranks[-1]))
            if better == 0:
                continue
            distances = self._compare(queries.embeddings[part], members.embeddings[:better], centre)
            # Members are in the order of their ranks, so that only those from the first query's rank on can be worse.
            sure = int(np.searchsorted(members.ranks, ranks[0]))
            distances[:, sure:][members.ranks[sure:better] >= ranks[:, None]] = np.inf
            penalties = self._rules.penalties(rows, members.rows[:better])
            if penalties is not None:
                distances += penalties
            best = distances.argmin(1)
            self._keep_best(rows, distances[np.arange(len(rows)), best], members.rows[best])

    def _keep_best(self, rows: np.ndarray, distances: np.ndarray, nearest: np.ndarray) -> None:
        """At equal distance the better-ranked one counts, in whatever order clusters come."""
        old, known = self._distances[rows], self._nearest[rows]
        equal = (distances == old) & np.isfinite(distances)
        equal[equal] = self._ranks[nearest[equal]] < self._ranks[known[equal]]
        won = (distances < old) | equal
        self._distances[rows[won]], self._nearest[rows[won]] = distances[won], nearest[won]


def _cosine_distances(a: np.ndarray, b: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.maximum(1 - a @ b.T, 0)


def _l2_distances(a: np.ndarray, b: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Measured from the cluster's centre, since the difference of large squares has few digits left."""
    a, b = a - centre, b - centre
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squared, 0))
