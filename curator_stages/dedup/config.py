"""Settings of semantic deduplication."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nemo_cosmos.errors import user_error

SimMetric = Literal["cosine", "l2"]
Backend = Literal["cpu", "gpu"]
DataFrames = Literal["pandas", "cudf"]


@dataclass(frozen=True, kw_only=True)
class SemanticDedupConfig:
    """Names and defaults of `eps_to_extract`, `sim_metric` and `max_iter` are those of the published curator.

    Source: REFERENCE section A; Abbas et al. 2023, "SemDeDup", https://arxiv.org/abs/2303.09540.
    """

    eps_to_extract: float = 0.01
    """Distance up to which an embedding duplicates a better one: 1 - cosine similarity, or Euclidean for `l2`."""
    eps_list: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Distances that the summary tells the number of duplicates for."""
    sim_metric: SimMetric = "cosine"
    """`cosine` compares directions, `l2` the embeddings as they are."""
    n_clusters: int | None = None
    """k-means clusters; None is the square root of the number of embeddings, 10,000 for the published 1e8 clips, and
    one cluster for up to 4,096 of them."""
    max_iter: int = 100
    """Most k-means iterations; it ends earlier when an iteration gains less than 0.01%."""
    max_visits: int = 16
    """Most clusters that one embedding is compared in. One near a border is compared on all its sides, which makes the
    result that of comparing everything with everything, as long as this limit leaves no side out."""
    memory_gb: float = 1.5
    """Most memory for the embeddings and what is computed from them, in GB; how many there are does not matter."""
    seed: int = 0
    """Of the choice of embeddings that k-means learns from."""
    backend: Backend = "cpu"
    """`cpu`: faiss and numpy. `gpu`: NeMo-Curator's workflow on cuML and Ray."""
    dataframes: DataFrames = "pandas"
    """Library of the tables of results, which go through Dask."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A field is out of its range.
        """
        largest = 2.0 if self.sim_metric == "cosine" else math.inf
        for name, values in (("eps_to_extract", (self.eps_to_extract,)), ("eps_list", self.eps_list)):
            if not values or not all(0 <= value <= largest for value in values):
                raise user_error(name, getattr(self, name), f"distances in [0, {largest:g}]", "Give one or more.")
        for name, known in (("sim_metric", SimMetric), ("backend", Backend), ("dataframes", DataFrames)):
            if getattr(self, name) not in get_args(known):
                raise user_error(name, getattr(self, name), f"one of {get_args(known)}", "Choose one of these.")
        for name in ("n_clusters", "max_iter", "max_visits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise user_error(name, value, "1 or more", "Give a positive number.")
        if self.memory_gb <= 0:
            raise user_error("memory_gb", self.memory_gb, "more than 0", "Give what the machine can spare.")
        if self.backend == "gpu" and self.sim_metric == "l2":
            raise user_error("sim_metric", "l2", "cosine with backend gpu", "NeMo-Curator compares by cosine only.")

    @property
    def reach(self) -> float:
        """Largest Euclidean distance of two duplicates; of unit vectors where the metric is `cosine`."""
        return math.sqrt(2 * self.eps_to_extract) if self.sim_metric == "cosine" else self.eps_to_extract

    def num_clusters(self, num_embeddings: int) -> int:
        """Returns the number of clusters for so many embeddings."""
        if self.n_clusters is not None:
            return min(self.n_clusters, num_embeddings)
        return 1 if num_embeddings <= 4096 else math.isqrt(num_embeddings)
