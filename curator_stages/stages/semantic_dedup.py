"""Semantic dedup: of clips that show nearly the same, one is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import ClipRecord

DUPLICATE_TAG = "duplicate_of:"
"""Prefix of the tag that names the kept clip."""


@dataclass
class SemanticDedupStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Clusters embeddings by k-means and rejects near-duplicates inside a cluster.

    Kept is the clip whose source has the most pixels, then the longest. Windows and camera views of one simulator
    rollout are never held against each other, since they look alike and teach different motion; copies of one are.

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
        """Compares the kept clips of the whole set."""
        places = [i for i, clip in enumerate(task.data) if clip.record.rejected_by is None]
        if len(places) < 2:
            return task
        records = [task.data[i].record for i in places]
        embeddings = np.stack([np.load(task.data[i].file(".npy")) for i in places])
        for duplicate, (kept, similarity) in find_duplicates(records, embeddings, self.config).items():
            place = places[duplicate]
            marked = _marked(records[duplicate], records[kept].clip_id, similarity, self.name)
            task.data[place] = StoredClip(record=marked, folder=task.data[place].folder)
        return task


def _marked(record: ClipRecord, kept_id: str, similarity: float, stage: str) -> ClipRecord:
    return replace(
        record,
        rejected_by=stage,
        rejected_reason=f"near-duplicate of {kept_id} (cosine similarity {similarity:.4f})",
        tags=(*record.tags, f"{DUPLICATE_TAG}{kept_id}"),
        scores=record.scores | {"dedup_similarity": similarity},
    )


def find_duplicates(
    records: list[ClipRecord], embeddings: np.ndarray, config: CurationConfig
) -> dict[int, tuple[int, float]]:
    """Finds near-duplicates.

    Args:
        records: Clips, N.
        embeddings: float32 [N, D], L2 norm 1.
        config: Thresholds and number of clusters.

    Returns:
        For each duplicate's position the position of the clip that is kept for it, and their cosine similarity.
    """
    count = config.dedup_clusters or max(1, len(records) // 1000)
    clusters = _clusters(embeddings, min(count, len(records)))
    found: dict[int, tuple[int, float]] = {}
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        found |= _duplicates_among(
            sorted(members.tolist(), key=lambda i: _rank(records[i])), records, embeddings, config
        )
    return found


def _clusters(embeddings: np.ndarray, count: int) -> np.ndarray:
    if count == 1:
        return np.zeros(len(embeddings), np.int64)
    import faiss

    kmeans = faiss.Kmeans(embeddings.shape[1], count, niter=25, seed=0, spherical=True, min_points_per_centroid=1)
    kmeans.train(embeddings)
    return kmeans.index.search(embeddings, 1)[1][:, 0]


def _rank(record: ClipRecord) -> tuple[float, float, str]:
    pixels = record.scores["source_height"] * record.scores["source_width"]
    return -pixels, -record.num_frames / record.fps, record.clip_id


def _duplicates_among(
    members: list[int], records: list[ClipRecord], embeddings: np.ndarray, config: CurationConfig
) -> dict[int, tuple[int, float]]:
    """Walks through a cluster from the best clip to the worst; each is held against those kept before it."""
    found: dict[int, tuple[int, float]] = {}
    kept: list[int] = []
    for member in members:
        excess = embeddings[kept] @ embeddings[member] - _thresholds(
            records[member], [records[k] for k in kept], config
        )
        best = int(excess.argmax()) if kept else -1
        if kept and excess[best] >= 0:
            found[member] = (kept[best], float(embeddings[kept[best]] @ embeddings[member]))
        else:
            kept.append(member)
    return found


def _thresholds(record: ClipRecord, others: list[ClipRecord], config: CurationConfig) -> np.ndarray:
    """Returns the similarity from which on `record` duplicates each of `others`; infinite where it never does."""
    simulated = record.conditions.actions is not None
    thresholds = np.full(len(others), config.dedup_similarity, np.float32)
    for i, other in enumerate(others):
        if simulated and other.conditions.actions is not None:
            siblings = (other.source, other.rollout) == (record.source, record.rollout)
            copies = siblings and _shown(other) == _shown(record)
            thresholds[i] = np.inf if siblings and not copies else config.dedup_similarity_simulated
    return thresholds


def _shown(record: ClipRecord) -> tuple[str | None, int, int]:
    """Returns which part of a rollout a clip shows: the same in two files means that one is a copy."""
    return record.conditions.view, record.start_frame, record.num_frames
