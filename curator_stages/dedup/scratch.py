"""Embeddings on disk, sorted by cluster, written and read in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Piece:
    """Some embeddings of one cluster, the best-ranked first."""

    embeddings: np.ndarray
    """float32 [n, D]."""
    rows: np.ndarray
    """int64 [n]; their numbers in the whole set."""
    ranks: np.ndarray
    """int64 [n], ascending."""


class ClusterFiles:
    """Embeddings in runs: each run holds what fitted in memory at once, sorted by cluster."""

    def __init__(self, folder: Path, num_clusters: int, dim: int) -> None:
        """Makes the folder."""
        folder.mkdir(parents=True)
        self._folder, self._num_clusters = folder, num_clusters
        self._record = np.dtype([("row", "<i8"), ("embedding", "<f4", (dim,))])
        self._borders: list[np.ndarray] = []

    def append(self, embeddings: np.ndarray, rows: np.ndarray, clusters: np.ndarray, positions: np.ndarray) -> None:
        """Writes a run.

        Args:
            embeddings: float32 [n, D].
            rows: int64 [n]; their numbers in the whole set.
            clusters: int64 [V]; into which cluster, and
            positions: int64 [V]; which of the embeddings goes.
        """
        order = np.argsort(clusters, kind="stable")
        with open(self._path(len(self._borders)), "wb") as file:
            for start in range(0, len(order), _ROWS_AT_ONCE):
                chosen = positions[order[start : start + _ROWS_AT_ONCE]]
                records = np.empty(len(chosen), self._record)
                records["row"], records["embedding"] = rows[chosen], embeddings[chosen]
                records.tofile(file)
        self._borders.append(np.searchsorted(clusters[order], np.arange(self._num_clusters + 1)))

    def pieces(self, cluster: int, most: int, ranks: np.ndarray) -> Iterator[Piece]:
        """Reads a cluster.

        Args:
            cluster: Which one.
            most: Largest number of embeddings at once.
            ranks: int [N]; rank of every embedding of the whole set.
        """
        parts: list[tuple[int, int, int]] = []
        count = 0
        for run, borders in enumerate(self._borders):
            start, end = int(borders[cluster]), int(borders[cluster + 1])
            while start < end:
                upto = min(end, start + most - count)
                parts.append((run, start, upto))
                count, start = count + upto - start, upto
                if count == most:
                    yield self._read(parts, ranks)
                    parts, count = [], 0
        if parts:
            yield self._read(parts, ranks)

    def _read(self, parts: list[tuple[int, int, int]], ranks: np.ndarray) -> Piece:
        records = np.concatenate([self._part(*part) for part in parts])
        order = np.argsort(ranks[records["row"]], kind="stable")
        rows = records["row"][order]
        return Piece(records["embedding"][order], rows, ranks[rows].astype(np.int64))

    def _part(self, run: int, start: int, end: int) -> np.ndarray:
        with open(self._path(run), "rb") as file:
            file.seek(start * self._record.itemsize)
            return np.fromfile(file, self._record, end - start)

    def _path(self, run: int) -> Path:
        return self._folder / f"{run:06d}.records"
