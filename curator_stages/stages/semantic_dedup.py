"""Semantic dedup: of clips that show nearly the same, one is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.dedup.clips import ClipRules, Duplicate, is_simulated, mark_duplicates, ranks_of
from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.embedding_files import write_embedding_files
from curator_stages.dedup.gpu import check_rapids
from curator_stages.dedup.neighbours import Batches, least_memory_gb, nearest_better
from curator_stages.dedup.semantic import semantic_dedup
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.errors import user_error

_FILES_AT_ONCE = 1024
_ROUNDING = 1e-7
"""Of a cosine in single precision: a clip at similarity 1 is a duplicate also where only 1 counts."""


@dataclass
class SemanticDedupStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Clusters embeddings by k-means and rejects near-duplicates inside a cluster.

    Kept is the clip whose source has the most pixels, then the longest. `ClipRules` tells what is compared on a CPU; on
    GPUs NeMo-Curator's workflow compares all clips of a cluster, for sets without simulated ones.

    Source: Abbas et al. 2023, "SemDeDup", https://arxiv.org/abs/2303.09540.
    """

    config: CurationConfig
    scratch_dir: str | None = None
    """Folder for the temporary files of the back-end `gpu`; None is the system's."""
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
            UserError: `dedup_memory_gb` is too little, or the back-end cannot be used.
        """
        places = [i for i, clip in enumerate(task.data) if clip.record.rejected_by is None]
        if len(places) < 2:
            return task
        clips = [task.data[i] for i in places]
        if self.config.dedup_backend == "gpu":
            found = find_duplicates_on_gpu(clips, self.config, self.scratch_dir)
        else:
            vectors = StoredEmbeddings([clip.file(".npy") for clip in clips])
            found = find_duplicates([clip.record for clip in clips], vectors, vectors.dim, self.config)
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


def write_embeddings(folder: Path, clips: list[StoredClip]) -> None:
    """Writes the embeddings of those clips that have one, as `nemo-cosmos dedup` reads them."""
    embedded = [c for c in clips if c.file(".npy").is_file()]
    if embedded:
        records = [c.record for c in embedded]
        write_embedding_files(
            folder,
            ids=[r.clip_id for r in records],
            pixels=[r.scores["source_height"] * r.scores["source_width"] for r in records],
            durations_s=[r.num_frames / r.fps for r in records],
            batches=StoredEmbeddings([c.file(".npy") for c in embedded]),
        )


def check_backend(num_clips: int, dim: int, config: CurationConfig, *, simulated: bool) -> None:
    """Makes sure, before any work, that so many clips can be compared.

    Args:
        num_clips: Clips, as far as is known.
        dim: Length of an embedding.
        config: Settings.
        simulated: Whether any of them come with what a simulator did.

    Raises:
        UserError: `dedup_memory_gb` is too little, or the back-end cannot be used.
    """
    if config.dedup_backend == "cpu":
        check_memory(num_clips, dim, config)
        return
    check_rapids()
    if simulated:
        expected = "cpu for clips with actions, of which NeMo-Curator's workflow would take many for duplicates"
        raise user_error("dedup_backend", "gpu", expected, "Choose cpu, or curate simulated videos by themselves.")


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
        duplicates[row] = _duplicate(nearest, 1 - float(found.distances[row]) + rules.penalty(row, nearest))
    return duplicates


def find_duplicates_on_gpu(
    clips: list[StoredClip], config: CurationConfig, scratch_dir: str | None = None
) -> dict[int, Duplicate]:
    """Finds near-duplicates by NeMo-Curator's workflow on cuML, which compares inside clusters only.

    Args:
        clips: With embeddings, N.
        config: Threshold and number of clusters.
        scratch_dir: Folder for temporary files, about as large as all embeddings twice.

    Returns:
        Duplicates by position.

    Raises:
        UserError: RAPIDS is not installed, or there are simulated clips.
    """
    import pyarrow.parquet as pq

    records = [clip.record for clip in clips]
    check_backend(len(clips), 0, config, simulated=any(is_simulated(record) for record in records))
    settings = SemanticDedupConfig(
        eps_to_extract=1 - config.dedup_similarity, n_clusters=config.dedup_clusters, backend="gpu"
    )
    # By its name the next run clears away what a killed one left.
    with tempfile.TemporaryDirectory(prefix=".set.", suffix=".part", dir=scratch_dir) as folder:
        write_embeddings(Path(folder) / "embeddings", clips)
        result = semantic_dedup(Path(folder) / "embeddings", Path(folder) / "result", settings)
        rows = pq.read_table(result.duplicates).to_pylist()
    places = {record.clip_id: place for place, record in enumerate(records)}
    return {places[row["id"]]: _duplicate(places[row["max_id"]], row["cosine_sim_score"]) for row in rows}


def _duplicate(of: int, similarity: float) -> Duplicate:
    told = f"near-duplicate of {{}} (cosine similarity {similarity:.4f})"
    return Duplicate(of, told, {"dedup_similarity": similarity})
