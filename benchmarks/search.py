"""What retrieval costs in time: all prefix sizes in one pass, and re-ranking, each beside its rival.

    python -m benchmarks.search                                          # everything, at the sizes of the documentation
    python -m benchmarks.search --parts sizes --rows 5000 --queries 100  # one part, small

Prints one JSON line a measurement. The contenders take turns within each repeat, so that a machine
that slows down slows all of them; ratios are medians of the ratios of each repeat. Embeddings are
normal noise. What adaptive retrieval saves is in benchmarks.adaptive_search. Needs faiss (pip install faiss-cpu).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mrl import exact_search, rerank
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list

try:
    import faiss
except ImportError as error:
    raise SystemExit("this benchmark compares with faiss; install it with: pip install faiss-cpu") from error


def report(measurement: str, **values: Any) -> None:
    about = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "max_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps({"measurement": measurement} | values | about), flush=True)


def take_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each contender, one a repeat after one that is not counted, and what each answered last."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers = {}
    names = list(contenders)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:  # nobody is always the first
            run = contenders[name]
            started = time.perf_counter()
            answers[name] = run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds, answers


def compare(measurement: str, seconds: dict[str, list[float]], base: str, **about: Any) -> None:
    """One line a contender: its median seconds, and its time as a multiple of ``base``'s."""
    for name, values in seconds.items():
        ratios = [own / other for own, other in zip(values, seconds[base], strict=True)]
        report(
            measurement,
            name=name,
            seconds=round(statistics.median(values), 4),
            fastest_seconds=round(min(values), 4),
            **{f"time_vs {base}": round(statistics.median(ratios), 3)},
            range=[round(min(ratios), 3), round(max(ratios), 3)],
            repeats=len(values),
            **about,
        )


def unit(vectors: np.ndarray, dim: int) -> np.ndarray:
    prefix = np.ascontiguousarray(vectors[:, :dim])
    faiss.normalize_L2(prefix)
    return prefix


def flat_index(database: np.ndarray, dim: int) -> Any:
    index = faiss.IndexFlatIP(dim)
    index.add(unit(database, dim))
    return index


def sizes(args: argparse.Namespace, rng: np.random.Generator) -> None:
    """All sizes in one pass, beside FAISS at full width alone and FAISS once per size."""
    database = rng.standard_normal((args.rows, args.width), dtype=np.float32)
    queries = rng.standard_normal((args.queries, args.width), dtype=np.float32)
    dims = default_nesting_list(args.width)
    indexes = {dim: flat_index(database, dim) for dim in dims}
    units = {dim: unit(queries, dim) for dim in dims}
    for k in args.ks:

        def at(dim: int, k: int = k) -> np.ndarray:
            return indexes[dim].search(units[dim], k)[1]

        def one_pass(k: int = k) -> dict[int, Any]:
            return exact_search(queries, database, k, dims)

        contenders = {
            "faiss full width": lambda: at(args.width),
            "faiss every size": lambda: {dim: at(dim) for dim in dims},
            "one pass, every size": one_pass,
        }
        seconds, answers = take_turns(contenders, args.repeats)
        same = [(answers["one pass, every size"][d][0] == answers["faiss every size"][d]).mean() for d in dims]
        compare(
            "nine sizes" if len(dims) == 9 else f"{len(dims)} sizes",
            seconds,
            "faiss full width",
            k=k,
            rows=args.rows,
            queries=args.queries,
            width=args.width,
            same_neighbors_as_faiss=round(float(min(same)), 6),
        )


def loop_rerank(queries: np.ndarray, database: np.ndarray, shortlist: np.ndarray) -> np.ndarray:
    """What a user would write: one query at a time."""
    order = np.empty_like(shortlist)
    for i, rows in enumerate(shortlist):
        vectors = database[rows]
        cosines = vectors @ queries[i] / np.linalg.norm(vectors, axis=1)
        order[i] = rows[np.argsort(-cosines, kind="stable")]
    return order


def reranking(args: argparse.Namespace, rng: np.random.Generator) -> None:
    """Shortlists of random rows ordered at full width, beside a loop over (a tenth of) the queries."""
    database = rng.standard_normal((args.rows, args.width), dtype=np.float32)
    queries = rng.standard_normal((args.rerank_queries, args.width), dtype=np.float32)
    shortlist = rng.integers(args.rows, size=(args.rerank_queries, args.shortlist_size))
    few = max(1, args.rerank_queries // 10)
    contenders = {
        "loop over queries": lambda: loop_rerank(queries[:few], database, shortlist[:few]),
        "rerank": lambda: rerank(queries, database, shortlist, args.width),
    }
    seconds, answers = take_turns(contenders, args.repeats)
    seconds["loop over queries"] = [value * args.rerank_queries / few for value in seconds["loop over queries"]]
    same = float((answers["rerank"][:few] == answers["loop over queries"]).mean())
    compare(
        "rerank",
        seconds,
        "rerank",
        rows=args.rows,
        queries=args.rerank_queries,
        shortlist_size=args.shortlist_size,
        width=args.width,
        same_order_as_loop=round(same, 6),
    )


PARTS = {"sizes": sizes, "rerank": reranking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--rows", type=int, default=50_000, help="database vectors")
    parser.add_argument("--queries", type=int, default=500, help="queries of sizes")
    parser.add_argument("--rerank_queries", type=int, default=10_000, help="queries of rerank")
    parser.add_argument("--width", type=int, default=2048, help="coordinates of an embedding")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 200], help="neighbors per query")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbors to re-rank")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    for part in args.parts:
        try:
            PARTS[part](args, np.random.default_rng(0))
        except UserError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
