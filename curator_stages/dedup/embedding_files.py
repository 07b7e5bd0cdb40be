"""Embeddings in parquet files, read in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from curator_stages.dedup.neighbours import Batches
from nemo_cosmos.errors import user_error

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 8192
_BATCHES_PER_FILE = 64
_BETTER_IF_LARGER = ("pixels", "duration_s")


@dataclass(frozen=True)
class EmbeddingFiles:
    """Parquet files with columns `id`, `embedding`, `pixels` (of the source, height times width) and `duration_s`."""

    paths: tuple[str, ...]
    dim: int
    ids: np.ndarray
    """Bytes [N]."""
    ranks: np.ndarray
    """int32 [N]; 0 has the most pixels, among equal ones is the longest, and then comes by its id."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads all columns but the embeddings.

        Args:
            folder: Searched recursively for `*.parquet`; or one file.

        Raises:
            UserError: There is no file, a column is missing, or ids occur twice.
        """
        root = Path(folder)
        paths = tuple(str(p) for p in ([root] if root.is_file() else sorted(root.rglob("*.parquet"))))
        if not paths:
            raise user_error("embeddings", str(folder), "a folder with *.parquet files", "Check the path.")
        ids = _empty_ids(paths)
        if not len(ids):
            raise user_error("embeddings", str(folder), "at least one row", "Write some first.")
        better, start = np.empty((len(_BETTER_IF_LARGER), len(ids))), 0
        for batch in _batches(paths, ["id", *_BETTER_IF_LARGER]):
            part = slice(start, start + len(batch))
            start += len(batch)
            ids[part] = _as_bytes(batch).to_pylist()
            for row, name in zip(better, _BETTER_IF_LARGER, strict=True):
                row[part] = batch.column(name).cast("float64").to_numpy(zero_copy_only=False)
        order = np.lexsort((ids, *np.negative(better, out=better)[::-1]))
        ranks = np.empty(len(ids), np.int32)
        ranks[order] = np.arange(len(ids))
        del better, order
        _check_unique(ids)
        return cls(paths, _dim_of(paths[0]), ids, ranks)

    def batches(self) -> Iterator[np.ndarray]:
        """Gives the embeddings, float32 [n, D] each, in the order of `ids`.

        Raises:
            UserError: One has another length.
        """
        for batch in _batches(self.paths, ["embedding"]):
            column = batch.column("embedding")
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(values) != len(batch) * self.dim:
                raise user_error(
                    "embedding", "lists of several lengths", f"{self.dim} numbers each", "Write them anew."
                )
            yield values.reshape(-1, self.dim)


def write_embedding_files(
    folder: Path, ids: Sequence[str], pixels: Sequence[float], durations_s: Sequence[float], batches: Batches
) -> None:
    """Writes what `EmbeddingFiles` reads.

    Args:
        folder: Is made.
        ids: Names, N.
        pixels: Of the source, height times width; N.
        durations_s: N.
        batches: Gives the embeddings, float32 [n, D] each, together N.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    start, writer = 0, None
    for number, batch in enumerate(batches()):
        part = slice(start, start + len(batch))
        start += len(batch)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(batch.ravel()), batch.shape[1])
        columns = {"id": ids[part], "embedding": vectors, "pixels": pixels[part], "duration_s": durations_s[part]}
        table = pa.table(columns)
        if number % _BATCHES_PER_FILE == 0:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(folder / f"part-{number // _BATCHES_PER_FILE:06d}.parquet", table.schema)
        assert writer is not None
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _batches(paths: tuple[str, ...], columns: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            if missing := sorted(set(columns) - set(file.schema_arrow.names)):
                raise user_error(path, f"no column {missing}", "id, embedding, pixels and duration_s", "Add it.")
            yield from file.iter_batches(_ROWS_AT_ONCE, columns=columns)


def _dim_of(path: str) -> int:
    first = next(_batches((path,), ["embedding"])).column("embedding")
    return len(first[0])


def _as_bytes(batch: pa.RecordBatch) -> pa.Array:
    return batch.column("id").cast("string").cast("binary")


def _empty_ids(paths: tuple[str, ...]) -> np.ndarray:
    """Makes room for all ids at once, as wide as the longest one."""
    import pyarrow.compute as pc

    count, width = 0, 1
    for batch in _batches(paths, ["id"]):
        count += len(batch)
        width = max(width, pc.max(pc.binary_length(_as_bytes(batch))).as_py() or 0)
    return np.empty(count, f"S{width}")


def _check_unique(ids: np.ndarray) -> None:
    order = np.argsort(ids)
    for start in range(0, len(ids), _ROWS_AT_ONCE):  # not all in order at once, which would take their size again
        ordered = ids[order[start : start + _ROWS_AT_ONCE + 1]]
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            raise user_error("id", ordered[twice[0]].decode(), "every id once", "Remove the second row, or rename it.")
