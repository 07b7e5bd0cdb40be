"""Semantic deduplication of embeddings that stand in parquet files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.embedding_files import EmbeddingFiles
from curator_stages.dedup.neighbours import nearest_better
from curator_stages.dedup.results import (
    DUPLICATES,
    PAIRWISE,
    SUMMARY,
    EpsSummary,
    check_dataframes,
    write_duplicates,
    write_pairwise,
)
from nemo_cosmos.files import written_aside


@dataclass(frozen=True)
class SemanticDedupResult:
    """What `semantic_dedup` wrote."""

    duplicates: str
    """Parquet file of what to remove at `eps_to_extract`, each with the better one that it is near to."""
    summary_csv: str
    summary: tuple[EpsSummary, ...]


def semantic_dedup(
    embeddings: str | Path, output_dir: str | Path, config: SemanticDedupConfig | None = None
) -> SemanticDedupResult:
    """Finds near-duplicates among embeddings, of which the one from the highest resolution is kept.

    Embeddings are clustered by k-means and compared inside the clusters. One is a duplicate when a better one - with
    more pixels, then longer, then first by its id - is within `eps_to_extract`. The order of files and rows does not
    matter. Memory follows `config.memory_gb`, of which each embedding takes 64 bytes and the length of the longest id.

    Args:
        embeddings: Folder of parquet files with columns `id`, `embedding`, `pixels` and `duration_s`.
        output_dir: Replaced as a whole by `duplicates.parquet`, `dedup_summary.csv` and `pairwise_results/`.
        config: Settings.

    Raises:
        UserError: Files or columns are missing, `memory_gb` is too little, the backend is not installed, or the disk
            is full.

    Source: Abbas et al. 2023, "SemDeDup", https://arxiv.org/abs/2303.09540; REFERENCE section A.
    """
    config = config or SemanticDedupConfig()
    check_dataframes(config.dataframes)
    with written_aside(output_dir) as aside:
        aside.mkdir()
        if config.backend == "gpu":
            from curator_stages.dedup.gpu import run_workflow

            run_workflow(Path(embeddings), aside, config)
            num_cut = 1  # NeMo-Curator compares inside clusters only: across them some may be missed
        else:
            files = EmbeddingFiles.open(embeddings)
            found = nearest_better(
                files.batches, files.ranks, files.dim, config, scratch=aside, held_bytes=files.ids.nbytes
            )
            write_pairwise(aside / PAIRWISE, files.ids, found, config)
            num_cut = found.num_cut
        summary = write_duplicates(aside, config, num_cut=num_cut)
    output = Path(output_dir)
    return SemanticDedupResult(str(output / DUPLICATES), str(output / SUMMARY), tuple(summary))
