"""The funnel in databases beside our own: milliseconds a query, and how well it finds what a full search finds.

    python -m benchmarks.databases                                          # synthetic embeddings
    python -m benchmarks.databases --vectors vectors.npy --queries 100      # those of python -m mrl.embed

Prints one JSON line a contender. All answer the same queries in one batch, and take turns within each
repeat. ``recall`` is the share of the k exact neighbors at full width that were found. Milvus Lite and
Qdrant's in-process client are what their makers offer for tests and small sets; their servers are faster.
Synthetic embeddings are those of benchmarks.adaptive_search: class centers whose early coordinates say most, and noise.
Needs faiss-cpu, qdrant-client, pymilvus and milvus-lite (pip install -r requirements-extras.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrl import exact_search, funnel_search
from mrl.errors import UserError
from mrl.interop import milvus, qdrant
from mrl.interop.faiss import prefix_index
from mrl.retrieval.embeddings import open_vectors

try:
    import faiss
    from pymilvus import MilvusClient
    from qdrant_client import QdrantClient
except ImportError as error:
    raise SystemExit(f"this benchmark needs {error.name}: pip install -r requirements-extras.txt") from error


def synthetic(rows: int, width: int, classes: int, noise: float) -> np.ndarray:
    """Embeddings ``(rows, width)`` of random classes."""
    generator = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(width, dtype=np.float32))
    centers = generator.standard_normal((classes, width), dtype=np.float32)
    spread = noise * generator.standard_normal((rows, width), dtype=np.float32)
    return scale * (centers[generator.integers(classes, size=rows)] + spread)


def contenders(args: argparse.Namespace, queries: np.ndarray, database: np.ndarray, folder: Path) -> dict[str, Any]:
    """``{name: search}``; each search returns the row numbers ``(Q, k)``."""
    width, k, low = database.shape[1], args.k, args.shortlist_dim
    stages = [(width, args.shortlist_size)]
    dims = (low, width)
    index = prefix_index(database, low, args.shortlist_size / k)
    graph = prefix_index(database, low, args.shortlist_size / k, "HNSW32")
    base: Any = faiss.downcast_index(graph.base_index)
    of_prefixes: Any = faiss.downcast_index(base.index)
    of_prefixes.hnsw.efSearch = args.shortlist_size
    in_qdrant, in_milvus = QdrantClient(":memory:"), MilvusClient(str(folder / "vectors.db"))
    for module, client in ((qdrant, in_qdrant), (milvus, in_milvus)):
        module.upload(client, "images", database, dims)
    asked = ("images", queries, low, stages)
    return {
        "ours, exact at full width": lambda: exact_search(queries, database, k, [width])[width][0],
        f"ours, funnel from {low}": lambda: funnel_search(queries, database, low, stages)[0][:, :k],
        f"FAISS, flat prefix of {low} + refine": lambda: index.search(queries, k)[1],
        f"FAISS, HNSW32 on a prefix of {low} + refine": lambda: graph.search(queries, k)[1],
        f"Qdrant in process, funnel from {low}": lambda: qdrant.funnel_search(in_qdrant, *asked)[0][:, :k],
        f"Milvus Lite, funnel from {low}": lambda: milvus.funnel_search(in_milvus, *asked)[0][:, :k],
    }


def measure(searches: dict[str, Callable[[], np.ndarray]], num_queries: int, repeats: int, **about: Any) -> None:
    """Run all in turns, one turn uncounted, and print a line each."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    answers = {}
    for repeat in range(repeats + 1):
        for name, search in searches.items():
            started = time.perf_counter()
            answers[name] = search()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    exact = next(iter(answers.values()))
    for name, found in answers.items():
        hits = (found[:, :, None] == exact[:, None, :]).any(axis=2)
        print(
            json.dumps(
                {
                    "measurement": "databases",
                    "name": name,
                    "milliseconds_per_query": round(1000 * statistics.median(seconds[name]) / num_queries, 4),
                    "recall": round(float(hits.mean()), 4),
                    "recall_at_1": round(float((found[:, 0] == exact[:, 0]).mean()), 4),
                    **about,
                    "cpu": platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(),
                    "load": round(os.getloadavg()[0], 1),
                }
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", metavar="FILE.npy", help="full-width vectors of python -m mrl.embed")
    parser.add_argument("--rows", type=int, default=4000, help="synthetic: database vectors")
    parser.add_argument("--width", type=int, default=512, help="synthetic: coordinates")
    parser.add_argument("--classes", type=int, default=200, help="synthetic: classes")
    parser.add_argument("--noise", type=float, default=1.0, help="synthetic: spread within a class over that between")
    parser.add_argument("--queries", type=int, default=50, help="vectors taken out of the database as queries")
    parser.add_argument("--shortlist_dim", type=int, default=16, help="prefix size of the first search")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbors that are ordered at full width")
    parser.add_argument("--k", type=int, default=10, help="neighbors wanted")
    parser.add_argument("--repeats", type=int, default=3, help="counted repeats")
    args = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        if args.vectors:
            vectors = np.array(open_vectors(args.vectors).vectors)
            vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
        else:
            vectors = synthetic(args.rows + args.queries, args.width, args.classes, args.noise)
        queries, database = vectors[: args.queries], vectors[args.queries :]
        with tempfile.TemporaryDirectory() as folder:
            searches = contenders(args, queries, database, Path(folder))
            about = {"rows": len(database), "width": database.shape[1], "shortlist_size": args.shortlist_size}
            measure(searches, len(queries), args.repeats, k=args.k, queries=len(queries), **about)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
