"""Measure exact search at all prefix sizes in one pass, and reranking, each beside an alternative.

    python -m benchmarks.search                                          # everything, at the sizes of docs/SPEED.md
    python -m benchmarks.search --parts sizes --rows 5000 --queries 100  # one part, small
    python -m benchmarks.search --parts sizes --run runs/mine            # the embeddings of a trained model

Prints one JSON line per measurement. The contenders take turns within each repeat, so that a slow moment of the machine
affects all of them; ratios are medians of the ratios of each repeat. Without --run, embeddings are normal noise.
FAISS's IndexFlatIPPanorama skips the rest of a vector whose first coordinates rule it out; its answer is exact. Needs
faiss-cpu 1.15 or newer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mrl import exact_search, rerank
from mrl.matryoshka import default_nesting_list
from mrl.studies.retrieval import thin_indices
from mrl.studies.run import open_run

try:
    import faiss
except ImportError as error:
    raise SystemExit("this benchmark compares with faiss; install it with: pip install faiss-cpu") from error


def report(measurement: str, **values: Any) -> None:
    """Print one JSON line."""
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "max_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps({"measurement": measurement} | values | machine), flush=True)


def take_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of each contender, one per repeat after a warm-up, and its last answer."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers = {}
    names = list(contenders)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:  # nobody is always the first
            started = time.perf_counter()
            answers[name] = contenders[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds, answers


def compare(measurement: str, seconds: dict[str, list[float]], base: str, **about: Any) -> None:
    """Report the median seconds of each contender, and its time as a multiple of ``base``'s."""
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
    """Return the normalized prefixes."""
    prefix = np.ascontiguousarray(vectors[:, :dim])
    faiss.normalize_L2(prefix)
    return prefix


def flat_index(database: np.ndarray, dim: int, levels: int | None = None) -> Any:
    """Return a FAISS index of the normalized prefixes; with ``levels``, a Panorama one that reads in so many steps."""
    index = faiss.IndexFlatIPPanorama(dim, levels) if levels else faiss.IndexFlatIP(dim)
    index.add(unit(database, dim))
    return index


def sizes(args: argparse.Namespace, rng: np.random.Generator) -> None:
    """Compare all sizes in one pass with FAISS at full width alone and with FAISS once per size."""
    if args.run:
        run = open_run(args.run)
        database = np.array(run.train.vectors[thin_indices(len(run.train.vectors), args.rows)])
        queries, dims = np.array(run.val.vectors[thin_indices(len(run.val.vectors), args.queries)]), run.dims
    else:
        database = rng.standard_normal((args.rows, args.width), dtype=np.float32)
        queries = rng.standard_normal((args.queries, args.width), dtype=np.float32)
        dims = default_nesting_list(args.width)
    width = dims[-1]
    flat = {dim: flat_index(database, dim) for dim in dims}
    panorama = {dim: flat_index(database, dim, max(2, dim // 32)) for dim in dims}
    units = {dim: unit(queries, dim) for dim in dims}
    about: dict[str, Any] = {"rows": len(database), "queries": len(queries), "width": width}

    def by_faiss(indexes: dict[int, Any], sizes: Sequence[int], k: int) -> dict[int, np.ndarray]:
        return {dim: indexes[dim].search(units[dim], k)[1] for dim in sizes}

    for k in args.ks:
        contenders: dict[str, Callable[[], Any]] = {
            "faiss full width": functools.partial(by_faiss, flat, [width], k),
            "faiss every size": functools.partial(by_faiss, flat, dims, k),
            "faiss Panorama full width": functools.partial(by_faiss, panorama, [width], k),
            "faiss Panorama every size": functools.partial(by_faiss, panorama, dims, k),
            "exact_search full width": functools.partial(exact_search, queries, database, k, [width]),
            "one pass, every size": functools.partial(exact_search, queries, database, k, dims),
        }
        seconds, answers = take_turns(contenders, args.repeats)
        exact = answers["faiss every size"]
        same = min((answers["one pass, every size"][d][0] == exact[d]).mean() for d in dims)
        about |= {"k": k, "same_neighbors_as_faiss": round(float(same), 6)}
        same = min((answers["faiss Panorama every size"][d] == exact[d]).mean() for d in dims)
        about |= {"same_neighbors_by_panorama": round(float(same), 6)}
        compare(f"{len(dims)} sizes", seconds, "faiss full width", **about)


def loop_rerank(queries: np.ndarray, database: np.ndarray, shortlist: np.ndarray) -> np.ndarray:
    """Rerank one query at a time, as a user would write it."""
    order = np.empty_like(shortlist)
    for i, indices in enumerate(shortlist):
        vectors = database[indices]
        cosines = vectors @ queries[i] / np.linalg.norm(vectors, axis=1)
        order[i] = indices[np.argsort(-cosines, kind="stable")]
    return order


def reranking(args: argparse.Namespace, rng: np.random.Generator) -> None:
    """Compare reranking of random shortlists at full width with a loop over a tenth of the queries."""
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
    about = {"rows": args.rows, "queries": args.rerank_queries, "width": args.width}
    about |= {"shortlist_size": args.shortlist_size, "same_order_as_loop": round(same, 6)}
    compare("rerank", seconds, "rerank", **about)


PARTS = {"sizes": sizes, "rerank": reranking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--run", help="sizes: a run that eval.py has embedded; training images are the database")
    parser.add_argument("--rows", type=int, default=50_000, help="database vectors")
    parser.add_argument("--queries", type=int, default=500, help="queries of sizes")
    parser.add_argument("--rerank_queries", type=int, default=10_000, help="queries of rerank")
    parser.add_argument("--width", type=int, default=2048, help="coordinates of an embedding")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 200], help="neighbors per query")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbors to rerank")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    for part in args.parts:
        PARTS[part](args, np.random.default_rng(0))


if __name__ == "__main__":
    main()
