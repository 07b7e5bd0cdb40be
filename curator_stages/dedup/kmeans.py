"""k-means over a sample, and the clusters that each embedding has to be compared in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ITERATIONS_AT_ONCE = 5
_LEAST_GAIN = 1e-4
"""Per iteration, as a share of the objective."""


def train_centroids(sample: np.ndarray, count: int, *, max_iter: int, spherical: bool) -> np.ndarray:
    """Finds cluster centres, the same ones for the same sample.

    Args:
        sample: float32 [N, D], in an order that does not depend on how the embeddings were stored.
        count: Number of clusters, at most N.
        max_iter: Most iterations.
        spherical: Keep the centres on the unit sphere.

    Returns:
        float32 [count, D].
    """
    import faiss

    centroids: np.ndarray = np.ascontiguousarray(sample[:count])
    best: float | None = None
    for done in range(0, max_iter, _ITERATIONS_AT_ONCE):
        kmeans = faiss.Kmeans(
            sample.shape[1],
            count,
            niter=min(_ITERATIONS_AT_ONCE, max_iter - done),
            seed=0,
            spherical=spherical,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        kmeans.train(sample, init_centroids=centroids)
        assert kmeans.centroids is not None and kmeans.obj is not None
        centroids, objective = kmeans.centroids, float(kmeans.obj[-1])
        if best is not None and abs(objective - best) <= _LEAST_GAIN * _ITERATIONS_AT_ONCE * abs(objective):
            break
        best = objective
    return centroids


@dataclass(frozen=True)
class Visits:
    """Which embeddings of a batch are compared in which clusters."""

    home: np.ndarray
    """int64 [n]; the nearest cluster, which an embedding is a member of."""
    rows: np.ndarray
    """int64 [V]; position in the batch of every visit to another cluster."""
    clusters: np.ndarray
    """int64 [V]; the cluster visited."""
    num_cut: int
    """Embeddings near more borders than `max_visits` allows."""


class Partition:
    """Space divided among centroids."""

    def __init__(self, centroids: np.ndarray, *, reach: float, max_visits: int) -> None:
        """Prepares the division.

        Args:
            centroids: float32 [k, D].
            reach: Largest Euclidean distance of two embeddings that have to meet in a cluster.
            max_visits: Most clusters for one embedding, its own included.
        """
        self.centroids = centroids
        self._half_norms = (centroids**2).sum(1) / 2
        gram = centroids @ centroids.T
        squared = 2 * (self._half_norms[:, None] + self._half_norms[None] - gram)
        self._margins = reach * np.sqrt(np.maximum(squared, 0))
        self._max_visits = max_visits

    def visits(self, batch: np.ndarray) -> Visits:
        """Finds the cluster of each embedding, and those across a border that is nearer than `reach`.

        With x in cluster a, an embedding within `reach` of x is in cluster b only if x lies within `reach` of the
        plane between the centres: (|x-b|^2 - |x-a|^2) / (2 |a-b|) <= reach. So duplicates meet in the cluster of
        either one, and what is found equals a comparison of everything with everything.

        Args:
            batch: float32 [n, D].
        """
        nearness = batch @ self.centroids.T - self._half_norms  # (|x|^2 - |x-c|^2) / 2
        home = nearness.argmax(1)
        each = np.arange(len(batch))
        gap = nearness[each, home][:, None] - nearness
        margins = self._margins[home]
        near = gap <= margins
        near[each, home] = False
        too_many = np.flatnonzero(near.sum(1) >= self._max_visits)
        for row in too_many:
            others = np.flatnonzero(near[row])
            depth = gap[row, others] / margins[row, others]
            near[row, others[np.argsort(depth, kind="stable")[self._max_visits - 1 :]]] = False
        rows, clusters = np.nonzero(near)
        return Visits(home=home, rows=rows, clusters=clusters, num_cut=len(too_many))
