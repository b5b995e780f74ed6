"""What adaptive retrieval saves in time: a shortlist on a small prefix and a funnel, beside exact full-width FAISS.

    python -m benchmarks.adaptive_search                                                  # 200,000 synthetic vectors
    python -m benchmarks.adaptive_search --database RUN/embeddings/train --queries RUN/embeddings/val

Prints one JSON line a contender: milliseconds a query, how many times faster than the full width, and 1-NN top-1 of
both. The contenders take turns within each repeat; ratios are medians of the ratios of each repeat. A contender finds
``--shortlist_size`` neighbours on a prefix, by exact FAISS or by FAISS's HNSW graph, which `funnel` orders at four
times that size and, the best 50 of them, at full width.

``--database`` takes folders of embeddings that eval.py has left in a run directory (several are put one after the
other). Without it embeddings are synthetic: each class has a centre whose coordinates are normal with a standard
deviation that falls as 1 / sqrt(1 + i), so that, as in a trained nested embedding, early coordinates say most, and an
image is its centre plus noise of the same shape times ``--noise``. Needs faiss (pip install faiss-cpu).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.search import faiss, flat_index, report, take_turns, unit
from mrl.errors import UserError
from mrl.retrieval.rerank import funnel

LAST_LENGTH = 50

Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # queries, their classes, database, its classes


def clustered(num_queries: int, num_rows: int, width: int, num_classes: int, noise: float) -> Sets:
    """Synthetic embeddings; see the module."""
    rng = np.random.default_rng(0)
    falling = (1 / np.sqrt(1 + np.arange(width))).astype(np.float32)
    centres = rng.standard_normal((num_classes, width), dtype=np.float32)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(num_classes, size=count)
        vectors = rng.standard_normal((count, width), dtype=np.float32)
        vectors *= noise
        vectors += centres[labels]
        vectors *= falling
        return vectors, labels

    return *images(num_queries), *images(num_rows)


def embedded(queries: Path, database: list[Path], num_queries: int) -> Sets:
    """Embeddings and labels as eval.py keeps them; of the queries some, evenly spread.

    Raises:
        UserError: A folder holds no embeddings.
    """
    for folder in (queries, *database):
        if not (folder / "metadata.json").is_file():
            raise UserError(f"{folder} holds no finished embeddings; eval.py leaves them in RUN/embeddings")
    vectors, labels = np.load(queries / "vectors.npy", mmap_mode="r"), np.load(queries / "labels.npy")
    some = np.linspace(0, len(labels) - 1, min(num_queries, len(labels))).astype(np.int64)
    rows = np.concatenate([np.load(folder / "vectors.npy") for folder in database])
    classes = np.concatenate([np.load(folder / "labels.npy") for folder in database])
    return np.array(vectors[some]), labels[some], rows, classes


def measure(sets: Sets, dims: list[int], shortlist_size: int, repeats: int, **about: Any) -> None:
    """One line a contender."""
    queries, query_labels, database, labels = sets
    width = database.shape[1]
    index = flat_index(database, width)
    full_queries = unit(queries, width)
    contenders: dict[str, Callable[[], np.ndarray]] = {"faiss full width": lambda: index.search(full_queries, 1)[1]}
    for dim in dims:
        stages = [(min(4 * dim, width), shortlist_size), (width, min(shortlist_size, LAST_LENGTH))]
        small, small_queries = flat_index(database, dim), unit(queries, dim)
        graph = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        started = time.perf_counter()
        graph.add(unit(database, dim))
        report("index build", name=f"HNSW32 at {dim}", seconds=round(time.perf_counter() - started, 1))
        graph.hnsw.efSearch = shortlist_size

        def search(of: Any, given: np.ndarray = small_queries, stages: Any = stages) -> np.ndarray:
            shortlist = of.search(given, shortlist_size)[1]
            return funnel(queries, database, shortlist, stages)[0]

        contenders[f"faiss exact at {dim}, funnel {stages}"] = functools.partial(search, small)
        contenders[f"HNSW32 at {dim}, funnel {stages}"] = functools.partial(search, graph)
    seconds, answers = take_turns(contenders, repeats)
    correct = {name: float((labels[found[:, 0]] == query_labels).mean()) for name, found in answers.items()}
    for name, top_1 in correct.items():
        speed = [full / own for full, own in zip(seconds["faiss full width"], seconds[name], strict=True)]
        report(
            "adaptive retrieval",
            name=name,
            milliseconds_per_query=round(1000 * statistics.median(seconds[name]) / len(queries), 4),
            speed_vs_full_width=round(statistics.median(speed), 1),
            range=[round(min(speed), 1), round(max(speed), 1)],
            top_1=round(top_1, 5),
            at_most_a_tenth_of_a_point_lower=top_1 >= correct["faiss full width"] - 0.001,
            rows=len(database),
            queries=len(queries),
            width=width,
            shortlist_size=shortlist_size,
            **about,
        )


def main(argv: list[str] | None = None) -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, nargs="+", metavar="DIR", help="embeddings; default: synthetic ones")
    parser.add_argument("--queries", type=Path, metavar="DIR", help="embeddings of the queries; with --database")
    parser.add_argument("--num_queries", type=int, default=1000, help="queries, searched at once")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbours handed on")
    parser.add_argument("--shortlist_dims", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="first prefixes")
    parser.add_argument("--repeats", type=int, default=3, help="counted repeats")
    parser.add_argument("--rows", type=int, default=200_000, help="synthetic: database vectors")
    parser.add_argument("--width", type=int, default=2048, help="synthetic: coordinates of an embedding")
    parser.add_argument("--classes", type=int, default=1000, help="synthetic: classes")
    parser.add_argument("--noise", type=float, default=1.5, help="synthetic: spread within a class over that between")
    args = parser.parse_args(argv)
    if (args.database is None) != (args.queries is None):
        parser.error("give --database and --queries together, or neither")
    faiss.omp_set_num_threads(torch.get_num_threads())
    about: dict[str, Any] = {}
    try:
        if args.database is None:
            about = {"classes": args.classes, "noise": args.noise}
            sets = clustered(args.num_queries, args.rows, args.width, args.classes, args.noise)
        else:
            sets = embedded(args.queries, args.database, args.num_queries)
        measure(sets, args.shortlist_dims, args.shortlist_size, args.repeats, **about)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
