"""Tables that semantic deduplication writes."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.neighbours import Neighbours
from nemo_cosmos.errors import UserError

PAIRWISE = "pairwise_results"
DUPLICATES = "duplicates.parquet"
SUMMARY = "dedup_summary.csv"
_ROWS_PER_FILE = 1 << 20
_ID_BYTES_PER_FILE = 16 << 20
"""A file is written and read at once, with several copies of its ids."""
_SIMILARITY, _DISTANCE = "cosine_sim_score", "l2_distance"
_DASK_BACKENDS = {"pandas": "pandas", "cudf": "dask_cudf"}
"""What Dask needs for tables of each library."""


@dataclass(frozen=True)
class EpsSummary:
    """One line of `dedup_summary.csv`."""

    eps: float
    kept: int
    removed: int
    total: int
    complete: bool
    """Whether every duplicate at this distance has been found; else some may have been missed across clusters."""


def write_pairwise(folder: Path, ids: np.ndarray, found: Neighbours, config: SemanticDedupConfig) -> None:
    """Writes every embedding's nearest better one: `id`, `max_id`, `cosine_sim_score` or `l2_distance`, `cluster`.

    Names and rule are those of NeMo-Curator's workflow: what has no better one in its cluster names itself, at
    similarity 0 or distance infinity.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rows = max(1, min(_ROWS_PER_FILE, _ID_BYTES_PER_FILE // ids.itemsize))
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        own = ids[part]
        nearest = found.nearest[part]
        distances = found.distances[part]
        columns = {
            "id": pa.array(own, pa.binary()).cast("string"),
            "max_id": pa.array(np.where(nearest < 0, own, ids[nearest]), pa.binary()).cast("string"),
            "cluster": pa.array(found.clusters[part]),
        }
        if config.sim_metric == "cosine":
            columns[_SIMILARITY] = pa.array(np.where(nearest < 0, 0, 1 - distances).astype(np.float32))
        else:
            columns[_DISTANCE] = pa.array(distances)
        pq.write_table(pa.table(columns), folder / f"part-{start // rows:06d}.parquet")


def write_duplicates(folder: Path, config: SemanticDedupConfig, *, num_cut: int = 0) -> list[EpsSummary]:
    """Writes what `eps_to_extract` removes and the summary by distance, from the pairwise table through Dask, by files.

    Args:
        folder: Holds `pairwise_results`, of either backend.
        config: Settings.
        num_cut: Embeddings that were not compared on all sides.

    Returns:
        A line per distance of `eps_list` and `eps_to_extract`.
    """
    import dask
    import pyarrow as pa
    import pyarrow.parquet as pq

    eps_list = sorted({*config.eps_list, config.eps_to_extract})
    paths = sorted(str(path) for path in (folder / PAIRWISE).rglob("*.parquet"))
    schema = pq.read_schema(paths[0]).remove_metadata()  # which no rows at all would not tell
    with dask.config.set({"dataframe.backend": config.dataframes}):
        from dask import dataframe

        table = dataframe.read_parquet(paths, split_row_groups=False)  # a file is a partition
        distances = _distances(table)
        total, *removed = (
            int(number) for number in dask.compute(table.shape[0], *((distances <= eps).sum() for eps in eps_list))
        )
        duplicates = table[distances <= config.eps_to_extract]
        with pq.ParquetWriter(folder / DUPLICATES, schema) as writer:
            for part in duplicates.partitions:
                writer.write_table(pa.Table.from_pandas(_to_pandas(part.compute()), schema, preserve_index=False))
    lines = [
        EpsSummary(eps, total - count, count, total, complete=eps <= config.eps_to_extract and num_cut == 0)
        for eps, count in zip(eps_list, removed, strict=True)
    ]
    _write_summary(folder / SUMMARY, lines)
    return lines


def _write_summary(path: Path, lines: Sequence[EpsSummary]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["eps", "kept", "removed", "total", "complete"])
        writer.writerows([line.eps, line.kept, line.removed, line.total, line.complete] for line in lines)


def check_dataframes(name: str) -> None:
    """Refuses a library of tables that is not installed.

    Raises:
        UserError: It is not.
    """
    library = _DASK_BACKENDS[name]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise UserError(f"dataframes: {name!r} needs {library} ({error}). Install it, or choose `pandas`.") from error


def _distances(table: Any) -> Any:  # noqa: ANN401 - a Dask frame and its column
    if _DISTANCE in table.columns:
        return table[_DISTANCE]
    # In single precision 1 - similarity would put some exact thresholds on the wrong side.
    return (1 - table[_SIMILARITY].astype("float64")).round(7)


def _to_pandas(table: Any) -> Any:  # noqa: ANN401 - a pandas or cudf frame
    return table.to_pandas() if hasattr(table, "to_pandas") else table
