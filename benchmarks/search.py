"""Measure exact search at all prefix sizes in one pass, reranking, and the memory of a search.

    python -m benchmarks.search                                          # at the sizes of docs/SPEED.md
    python -m benchmarks.search --parts sizes --rows 5000 --queries 100  # one part, small
    python -m benchmarks.search --parts sizes --run runs/mine            # the embeddings of a trained model
    python -m benchmarks.search --parts memory --rows 1281167 --ks 200   # a memory-mapped file of 10 GiB (Linux)

Prints one JSON line per measurement. Contenders take turns; ratios are medians of the ratios of each repeat. Without
--run, embeddings are normal noise. FAISS's IndexFlatIPPanorama skips the rest of a vector whose first coordinates rule
it out; its answer is exact. Needs faiss-cpu 1.15 or newer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Timed, ratios, report, take_turns
from mrl import exact_search, rerank
from mrl.matryoshka import default_nesting_list
from mrl.studies.retrieval import thin_indices
from mrl.studies.run import open_run

try:
    import faiss
except ImportError as error:
    raise SystemExit("this benchmark compares with faiss; install it with: pip install faiss-cpu") from error


def compare(measurement: str, timed: dict[str, Timed], base: str, **about: Any) -> None:
    """Report the median seconds of each contender, and its time as a multiple of ``base``'s."""
    for name, own in timed.items():
        about |= {"seconds": round(statistics.median(own.seconds), 4), "repeats": len(own.seconds)}
        report(measurement, name=name, **about, **ratios(f"time_vs {base}", own.seconds, timed[base].seconds))


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
        timed = take_turns(contenders, args.repeats)
        exact, panorama_found, ours = (timed[name].answer for name in list(timed)[1::2])
        about: dict[str, Any] = {"rows": len(database), "queries": len(queries), "width": width, "k": k}
        about["same_neighbors_as_faiss"] = round(min(float((ours[d][0] == exact[d]).mean()) for d in dims), 6)
        about["same_by_panorama"] = round(min(float((panorama_found[d] == exact[d]).mean()) for d in dims), 6)
        compare(f"{len(dims)} sizes", timed, "faiss full width", **about)


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
    timed = take_turns(contenders, args.repeats)
    loop = timed["loop over queries"]
    loop.seconds = [value * args.rerank_queries / few for value in loop.seconds]
    same = float((timed["rerank"].answer[:few] == loop.answer).mean())
    about = {"rows": args.rows, "queries": args.rerank_queries, "width": args.width}
    about |= {"shortlist_size": args.shortlist_size, "same_order_as_loop": round(same, 6)}
    compare("rerank", timed, "rerank", **about)


def memory(args: argparse.Namespace, rng: np.random.Generator) -> None:
    """Measure the memory that a search over a memory-mapped file adds, without the pages of files."""
    queries, dims = rng.standard_normal((args.queries, args.width), dtype=np.float32), default_nesting_list(args.width)
    samples, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            samples.append(int(status.partition("RssAnon:")[2].split()[0]) / 2**20)

    with tempfile.NamedTemporaryFile(dir=args.scratch) as file:
        database = np.memmap(file, np.float32, "w+", shape=(args.rows, args.width))
        for first in range(0, args.rows, 10_000):
            rng.standard_normal(out=database[first : first + 10_000], dtype=np.float32)
        database.flush()
        exact_search(queries[:1], database[:64], 1, dims)  # load the libraries first
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        time.sleep(0.2)
        started = time.perf_counter()
        exact_search(queries, database, args.ks[0], dims, progress=True)
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    about = {"rows": args.rows, "width": args.width, "queries": args.queries, "k": args.ks[0], "dims": dims}
    added = {"memory_beyond_page_cache_gib": round(max(samples) - samples[0], 2), "seconds": round(seconds, 1)}
    report("every size in one pass, database in a mapped file", **about, **added)


PARTS = {"sizes": sizes, "rerank": reranking, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["sizes", "rerank"], help="what to measure")
    parser.add_argument("--run", help="sizes: a run that eval.py has embedded; training images are the database")
    parser.add_argument("--rows", type=int, default=50_000, help="database vectors")
    parser.add_argument("--queries", type=int, default=500, help="queries of sizes and memory")
    parser.add_argument("--rerank_queries", type=int, default=10_000, help="queries of rerank")
    parser.add_argument("--width", type=int, default=2048, help="coordinates of an embedding")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 200], help="neighbors per query")
    parser.add_argument("--shortlist_size", type=int, default=200, help="neighbors to rerank")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    parser.add_argument("--scratch", metavar="DIR", help="memory: folder for a file of rows x width x 4 bytes")
    args = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    for part in args.parts:
        PARTS[part](args, np.random.default_rng(0))


if __name__ == "__main__":
    main()
