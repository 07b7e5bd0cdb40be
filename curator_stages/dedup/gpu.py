"""Semantic deduplication by NeMo-Curator's workflow: k-means by cuML over all GPUs, pairwise comparison by torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.embedding_files import EmbeddingFiles
from curator_stages.dedup.results import PAIRWISE
from nemo_cosmos.errors import UserError

_WORKFLOW_CLUSTERS = 1000
"""Least number of clusters that NeMo-Curator's workflow advises for sets that do not fit a GPU."""


def check_rapids() -> None:
    """Refuses the back-end where it cannot run.

    Raises:
        UserError: RAPIDS (cudf, cuml) is not installed.
    """
    try:
        from nemo_curator.stages.deduplication.semantic import SemanticDeduplicationWorkflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"backend: 'gpu' needs RAPIDS ({error}). Install nemo-curator[deduplication_cuda12], or choose `cpu`."
        ) from error


def run_workflow(embeddings: Path, output: Path, config: SemanticDedupConfig) -> None:
    """Fills `output/pairwise_results` with the nearest better embedding of each.

    Args:
        embeddings: Folder of parquet files.
        output: An empty folder.
        config: Settings; `memory_gb` and `max_visits` have no part in it.

    Raises:
        UserError: RAPIDS (cudf, cuml) is not installed.
    """
    check_rapids()
    from nemo_curator.stages.deduplication.semantic import SemanticDeduplicationWorkflow
    from nemo_curator.stages.deduplication.semantic.ranking import RankingStrategy

    files = EmbeddingFiles.open(embeddings)
    count = config.n_clusters or min(len(files.ids), max(_WORKFLOW_CLUSTERS, config.num_clusters(len(files.ids))))
    cache = output / "cache"
    SemanticDeduplicationWorkflow(
        input_path=list(files.paths),
        output_path=str(output / "workflow"),
        cache_path=str(cache),
        n_clusters=count,
        id_field="id",
        embedding_field="embedding",
        metadata_fields=["pixels", "duration_s"],
        max_iter=config.max_iter,
        random_state=config.seed,
        ranking_strategy=RankingStrategy(["pixels", "duration_s", "id"], ascending=[False, False, True]),
        kmeans_embedding_output_dtype="float32",
        pairwise_compute_dtype="float32",
        verbose=False,
    ).run()
    (cache / PAIRWISE).rename(output / PAIRWISE)
    for leftover in (cache, output / "workflow"):
        shutil.rmtree(leftover, ignore_errors=True)
