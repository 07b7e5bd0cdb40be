"""Time, memory and recall of semantic deduplication on embeddings that are hard to cluster.

    python -m benchmarks.dedup                        # 100,000 x 768, beside brute force
    python -m benchmarks.dedup --count 1000000 --queries 2000

The embeddings (`hard_embeddings`) stand in parquet files and run in a process of its own, whose peak memory is
measured, imports included. Brute force holds `--queries` of them, drawn at random, against all others. Recall is the
share of its duplicates that are found at the same threshold, by distance; `clusters only` leaves out the comparison
across near borders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EPS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1)
_ROWS_PER_FILE = 50_000

_RUN = """
import resource, sys, time
from pathlib import Path
from curator_stages.dedup.config import SemanticDedupConfig
from curator_stages.dedup.semantic import semantic_dedup
config = SemanticDedupConfig(memory_gb=float(sys.argv[3]), max_visits=int(sys.argv[4]), eps_list=eval(sys.argv[5]))
start = time.perf_counter()
result = semantic_dedup(sys.argv[1], sys.argv[2], config)
seconds = time.perf_counter() - start
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, time.process_time(), int(peak.split()[1]) / 1e6, result.summary[0].complete)
"""


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--memory-gb", type=float, default=1.5)
    parser.add_argument("--queries", type=int, default=10_000, help="for brute force (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dedup_benchmark.") as folder:
        root = Path(folder)
        pixels = write_embeddings(root / "in", args.count, args.dim)
        print(f"{args.count:,} x {args.dim}, memory_gb {args.memory_gb:g}")
        found = {}
        for name, visits in (("semantic_dedup", 16), ("clusters only", 1)):
            command = [sys.executable, "-c", _RUN, str(root / "in"), str(root / name), str(args.memory_gb)]
            told = subprocess.run([*command, str(visits), repr(EPS)], check=True, capture_output=True, text=True).stdout
            seconds, cpu_s, peak_gb, complete = told.split()
            print(f"{name:16} {float(seconds):6.1f} s ({float(cpu_s):.1f} s of CPU), {float(peak_gb):.2f} GB, "
                  f"complete: {complete}")  # fmt: skip
            found[name] = read_distances(root / name)
        start = time.perf_counter()
        queries = np.sort(np.random.default_rng(1).permutation(args.count)[: args.queries])
        exact = brute_force(root / "in", pixels, args.dim, queries)
        print(f"{'brute force':16} {time.perf_counter() - start:6.1f} s for {len(queries):,} of them")
        print_recall(exact, {name: distances[queries] for name, distances in found.items()})


def hard_embeddings(
    rng: np.random.Generator, count: int, dim: int, topics: np.ndarray, bases: np.ndarray
) -> np.ndarray:
    """Makes embeddings in topics of very different sizes, rich in near-duplicates.

    Each topic varies mostly in 12 directions; every tenth embedding lies between two topics; three in ten are copies
    of others at cosine distances from 0.0003 to 0.16, evenly by logarithm, half of them moved in any direction and
    half along their topic's own.
    """
    sizes = 1 / np.arange(1, len(topics) + 1) ** 0.8
    chosen = rng.choice(len(topics), count, p=sizes / sizes.sum())
    vectors = topics[chosen] + 0.15 * rng.standard_normal((count, dim), dtype=np.float32)
    for topic in range(len(topics)):
        rows = np.flatnonzero(chosen == topic)
        vectors[rows] += 0.35 * rng.standard_normal((len(rows), 12), dtype=np.float32) @ bases[topic]
    between = rng.permutation(count)[: count // 10]
    vectors[between] = (vectors[between] + vectors[rng.integers(0, count, len(between))]) / 2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = rng.permutation(count)[: 3 * count // 10]
    sources = rng.integers(0, count, len(copies))
    moved = rng.standard_normal((len(copies), dim), dtype=np.float32)
    for i in range(0, len(copies), 2):
        moved[i] = rng.standard_normal(12, dtype=np.float32) @ bases[chosen[sources[i]]]
    originals = vectors[sources]
    moved -= (moved * originals).sum(1, keepdims=True) * originals
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = 1 - 10 ** rng.uniform(-3.5, -0.8, (len(copies), 1)).astype(np.float32)
    vectors[copies] = cosines * originals + np.sqrt(1 - cosines**2) * moved
    return vectors


def write_embeddings(folder: Path, count: int, dim: int) -> np.ndarray:
    """Writes parquet files and returns the pixels of each embedding's source."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((200, dim), dtype=np.float32)
    bases = rng.standard_normal((200, 12, dim), dtype=np.float32)
    folder.mkdir()
    all_pixels = []
    for start in range(0, count, _ROWS_PER_FILE):
        rows = min(_ROWS_PER_FILE, count - start)
        vectors = hard_embeddings(rng, rows, dim, topics, bases)
        pixels = rng.choice([640 * 360, 1280 * 720, 1920 * 1080], rows)
        table = pa.table(
            {
                "id": [f"{i:016x}" for i in range(start, start + rows)],
                "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), dim),
                "pixels": pixels,
                "duration_s": np.full(rows, 5.0),
            }
        )
        pq.write_table(table, folder / f"{start:09d}.parquet", row_group_size=8192)
        all_pixels.append(pixels)
    return np.concatenate(all_pixels)


def read_distances(folder: Path) -> np.ndarray:
    """Reads what was found, in the order of the ids."""
    table = pq.read_table(folder / "pairwise_results", columns=["id", "cosine_sim_score"])
    order = np.argsort(table["id"].to_numpy())
    return 1 - table["cosine_sim_score"].to_numpy()[order].astype(np.float64)


def brute_force(folder: Path, pixels: np.ndarray, dim: int, queries: np.ndarray) -> np.ndarray:
    """Returns the distance of some embeddings to the nearest better-ranked one, held against all."""
    ranks = np.empty(len(pixels), np.int64)
    ranks[np.lexsort((np.arange(len(pixels)), -pixels))] = np.arange(len(pixels))
    wanted = np.concatenate([batch[queries[inside] - first] for first, batch, inside in _batches(folder, dim, queries)])
    best = np.full(len(queries), -1.0)
    for first, batch, _ in _batches(folder, dim, queries):
        for start in range(0, len(queries), 1024):
            part = slice(start, start + 1024)
            similarity = wanted[part] @ batch.T
            similarity[ranks[first : first + len(batch)] >= ranks[queries[part]][:, None]] = -1
            best[part] = np.maximum(best[part], similarity.max(1))
    return np.where(best < -0.999, np.inf, 1 - best)


def _batches(folder: Path, dim: int, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Gives the number of the first embedding, the embeddings, and which queries are among them."""
    first = 0
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(8192, columns=["embedding"]):
            vectors = batch.column("embedding").flatten().to_numpy().reshape(-1, dim)
            yield first, vectors, (queries >= first) & (queries < first + len(vectors))
            first += len(vectors)


def print_recall(exact: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Prints recall and precision by distance; what lies within rounding of the threshold is left out."""
    print(f"{'eps':>8}{'duplicates':>12}" + "".join(f"{name + ' recall':>24}{'precision':>11}" for name in found))
    for eps in EPS:
        sure = np.abs(exact - eps) > 1e-6
        true = (exact <= eps) & sure
        line = f"{eps:8}{true.sum():12,}"
        for distances in found.values():
            named = (distances <= eps) & sure
            line += f"{(true & named).sum() / true.sum():24.4%}{(true & named).sum() / max(1, named.sum()):11.2%}"
        print(line)


if __name__ == "__main__":
    main()
