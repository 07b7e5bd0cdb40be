"""Semantic dedup: of clips that show nearly the same, one is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.dedup.clips import ClipRules, Duplicate, mark_duplicates, ranks_of
from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.neighbours import Batches, least_memory_gb, nearest_better
from curator_stages.tasks import ClipSetTask
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.errors import user_error

_FILES_AT_ONCE = 1024
_ROUNDING = 1e-7
"""Of a cosine in single precision: a clip at similarity 1 is a duplicate also where only 1 counts."""


@dataclass
class SemanticDedupStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Clusters embeddings by k-means and rejects near-duplicates inside a cluster.

    Kept is the clip whose source has the most pixels, then the longest. `ClipRules` tells what is compared.

    Source: Abbas et al. 2023, "SemDeDup", https://arxiv.org/abs/2303.09540.
    """

    config: CurationConfig
    name: str = "semantic_dedup"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    is_resumable: bool = False

    def inputs(self) -> tuple[list[str], list[str]]:
        """All clips of a run."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """All clips, duplicates marked."""
        return ["data"], []

    def process(self, task: ClipSetTask) -> ClipSetTask:
        """Compares the kept clips of the whole set.

        Raises:
            UserError: `dedup_memory_gb` is too little.
        """
        places = [i for i, clip in enumerate(task.data) if clip.record.rejected_by is None]
        if len(places) < 2:
            return task
        records = [task.data[i].record for i in places]
        vectors = StoredEmbeddings([task.data[i].file(".npy") for i in places])
        found = find_duplicates(records, vectors, vectors.dim, self.config)
        task.data = mark_duplicates(task.data, places, found, self.name)
        return task


class StoredEmbeddings:
    """Embeddings in a file each, read in pieces."""

    def __init__(self, paths: list[Path]) -> None:
        """Takes the files, at least one."""
        self._paths = paths
        self.dim = len(np.load(paths[0]))

    def __call__(self) -> Iterator[np.ndarray]:
        """Gives them, float32 [n, dim] each."""
        for start in range(0, len(self._paths), _FILES_AT_ONCE):
            yield np.stack([np.load(path) for path in self._paths[start : start + _FILES_AT_ONCE]])


def check_memory(num_clips: int, dim: int, config: CurationConfig) -> None:
    """Makes sure that so many clips can be compared.

    Raises:
        UserError: `dedup_memory_gb` is too little.
    """
    clusters = SemanticDedupConfig(n_clusters=config.dedup_clusters).num_clusters(num_clips)
    least = least_memory_gb(num_clips, dim, clusters)
    if config.dedup_memory_gb < least:
        expected = f"at least {least:.2f} for {num_clips:,} clips in {clusters:,} clusters"
        mend = "Give more, or fewer dedup_clusters; what is done of the videos is kept."
        raise user_error("dedup_memory_gb", config.dedup_memory_gb, expected, mend)


def find_duplicates(
    records: list[ClipRecord], batches: Batches, dim: int, config: CurationConfig
) -> dict[int, Duplicate]:
    """Finds near-duplicates.

    Args:
        records: Clips, N.
        batches: Gives their embeddings, float32 [n, dim] each.
        dim: Length of an embedding.
        config: Thresholds and number of clusters.

    Returns:
        Duplicates by position.

    Raises:
        UserError: `dedup_memory_gb` is too little.
    """
    eps = 1 - config.dedup_similarity
    settings = SemanticDedupConfig(
        eps_to_extract=max(eps, 1 - config.dedup_similarity_simulated),
        n_clusters=config.dedup_clusters,
        memory_gb=config.dedup_memory_gb,
    )
    check_memory(len(records), dim, config)
    rules = ClipRules(records, penalty=config.dedup_similarity_simulated - config.dedup_similarity)
    found = nearest_better(batches, ranks_of(records), dim, settings, rules=rules)
    duplicates = {}
    for row in np.flatnonzero(found.distances <= eps + _ROUNDING).tolist():
        nearest = int(found.nearest[row])
        similarity = 1 - float(found.distances[row]) + rules.penalty(row, nearest)
        told = f"near-duplicate of {{}} (cosine similarity {similarity:.4f})"
        duplicates[row] = Duplicate(nearest, told, {"dedup_similarity": similarity})
    return duplicates
