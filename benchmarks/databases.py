"""Compare the funnel in vector databases with our own: milliseconds per query and recall.

    python -m benchmarks.databases                                          # synthetic embeddings
    python -m benchmarks.databases --vectors vectors.npy --queries 100      # those of python -m mrl.embed

Prints one JSON line per contender. All answer the same queries in one batch and take turns within each repeat.
``recall`` is the share of the k exact neighbors at full width that were found. Milvus Lite and Qdrant's in-process
client are meant for tests and small sets; the servers are faster. Synthetic embeddings are those of
benchmarks.adaptive_search. Needs faiss-cpu, qdrant-client, pymilvus and milvus-lite (requirements-extras.txt).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adaptive_search import clustered
from benchmarks.search import faiss, report, take_turns
from mrl import exact_search, funnel_search
from mrl.errors import UserError
from mrl.interop import milvus, qdrant
from mrl.interop.faiss import prefix_index
from mrl.retrieval.embeddings import open_vectors

try:
    from pymilvus import MilvusClient
    from qdrant_client import QdrantClient
except ImportError as error:
    raise SystemExit(f"this benchmark needs {error.name}: pip install -r requirements-extras.txt") from error

EXACT = "ours, exact at full width"


def contenders_of(args: argparse.Namespace, queries: np.ndarray, database: np.ndarray, folder: Path) -> dict[str, Any]:
    """Fill the databases and return ``{name: search}``; each search returns indices ``(Q, k)``."""
    width, k, low = database.shape[1], args.k, args.shortlist_dim
    stages = [(width, args.shortlist_size)]
    index = prefix_index(database, low, args.shortlist_size / k)
    graph = prefix_index(database, low, args.shortlist_size / k, "HNSW32")
    base: Any = faiss.downcast_index(graph.base_index)
    of_prefixes: Any = faiss.downcast_index(base.index)
    of_prefixes.hnsw.efSearch = args.shortlist_size
    in_qdrant, in_milvus = QdrantClient(":memory:"), MilvusClient(str(folder / "vectors.db"))
    qdrant.upload(in_qdrant, "images", database, (low, width))
    milvus.upload(in_milvus, "images", database, (low, width))
    asked = ("images", queries, low, stages)
    return {
        EXACT: lambda: exact_search(queries, database, k, [width])[width][0],
        f"ours, funnel from {low}": lambda: funnel_search(queries, database, low, stages)[0][:, :k],
        f"FAISS, flat prefix of {low} + refine": lambda: index.search(queries, k)[1],
        f"FAISS, HNSW32 on a prefix of {low} + refine": lambda: graph.search(queries, k)[1],
        f"Qdrant in process, funnel from {low}": lambda: qdrant.funnel_search(in_qdrant, *asked)[0][:, :k],
        f"Milvus Lite, funnel from {low}": lambda: milvus.funnel_search(in_milvus, *asked)[0][:, :k],
    }


def measure(args: argparse.Namespace, queries: np.ndarray, database: np.ndarray, folder: Path) -> None:
    """Report every contender."""
    seconds, answers = take_turns(contenders_of(args, queries, database, folder), args.repeats)
    for name, found in answers.items():
        hits = (found[:, :, None] == answers[EXACT][:, None, :]).any(axis=2)
        report(
            "databases",
            name=name,
            milliseconds_per_query=round(1000 * statistics.median(seconds[name]) / len(queries), 4),
            recall=round(float(hits.mean()), 4),
            recall_at_1=round(float((found[:, 0] == answers[EXACT][:, 0]).mean()), 4),
            k=args.k,
            queries=len(queries),
            rows=len(database),
            width=database.shape[1],
            shortlist_size=args.shortlist_size,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", metavar="FILE.npy", help="full-width vectors of python -m mrl.embed")
    parser.add_argument("--rows", type=int, default=4000, help="synthetic: database vectors")
    parser.add_argument("--width", type=int, default=512, help="synthetic: coordinates")
    parser.add_argument("--classes", type=int, default=200, help="synthetic: classes")
    parser.add_argument("--noise", type=float, default=1.0, help="synthetic: std within a class over that between")
    parser.add_argument("--queries", type=int, default=50, help="vectors taken out of the database as queries")
    parser.add_argument("--shortlist_dim", type=int, default=16, help="prefix size of the first search")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbors to rerank at full width")
    parser.add_argument("--k", type=int, default=10, help="neighbors wanted")
    parser.add_argument("--repeats", type=int, default=3, help="counted repeats")
    args = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        if args.vectors:
            vectors = np.random.default_rng(0).permutation(open_vectors(args.vectors).vectors)
            queries, database = vectors[: args.queries], vectors[args.queries :]
        else:
            queries, _, database, _ = clustered(args.queries, args.rows, args.width, args.classes, args.noise)
        with tempfile.TemporaryDirectory() as folder:
            measure(args, queries, database, Path(folder))
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
