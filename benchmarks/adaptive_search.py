"""Measure the time that adaptive retrieval saves over exact FAISS at full width.

    python -m benchmarks.adaptive_search --run runs/mine
    python -m benchmarks.adaptive_search --run runs/mine --views 10 --num_queries 10000

Prints one JSON line per contender: milliseconds per query, speed relative to the full width, 1-NN top-1 in percent, and
bytes per vector of the index. The last line is the fastest contender that is at most 0.1 points behind the full width
on every second query, with its top-1 on the others. Contenders take turns; ratios are medians of the ratios of each
repeat.

A contender finds a shortlist on a prefix by a FAISS index, and reranks it at full width in float16, a further 2 bytes
for each dim. Its name is FAISS's (``index_factory``): Flat (exact), SQ8 (int8), LSHrt (sign bits), HNSW32 (efSearch is
the shortlist's size), IVF4096,SQ8 (int8, 16 lists are read).

The queries and the database are the embeddings of the run's val and train images that eval.py left. With --views N, the
database holds N vectors of each training image: what the trained layers make of windows of the map that the frozen
layers give (train.cache_views), the whole map first, then windows that are smaller by one, and so on. Needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.search import faiss, unit
from benchmarks.timing import ratios, report, take_turns
from mrl import distributed
from mrl.data import build_data
from mrl.errors import UserError
from mrl.model import freeze
from mrl.progress import progress
from mrl.retrieval.rerank import funnel
from mrl.studies.retrieval import thin_indices
from mrl.studies.run import OpenedRun, open_run
from mrl.training.frozen import CachedImages, TrunkCache

FULL = "faiss full width"
NPROBE = 16
ROWS = 50_000  # database rows that are normalized, or images that are read, at a time

Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # queries, their labels, database, its labels


def embedded(run: OpenedRun, num_views: int, num_queries: int) -> Sets:
    """Return the embeddings and labels of a run, the database in float16, with evenly spread queries."""
    some = thin_indices(len(run.val.labels), num_queries)
    database = views(run, num_views) if num_views > 1 else np.asarray(run.train.vectors).astype(np.float16)
    return np.array(run.val.vectors[some]), run.val.labels[some], database, np.tile(run.train.labels, num_views)


@torch.inference_mode()
def views(run: OpenedRun, num_views: int) -> np.ndarray:
    """Return the embeddings of ``num_views`` windows of each training image, ``(num_views * N, D)`` float16."""
    config, process = run.config, distributed.Process(0, 1, torch.device("cpu"))
    if not config.train.cache_views:
        raise UserError("--views needs a run whose frozen layers were stored (train.cache_views)")
    images = build_data(config.data, config.run.seed, process.device, False, splits=("train",))["train"]
    freeze(run.model, config.model.trainable)
    cache = TrunkCache(run.model, config, run.directory.parent / "trunk_cache", config.train.precision, process)
    stored, side = CachedImages(cache, "train", images), cache.shape(config.data.eval_px)[-1]
    boxes = [
        (slice(top, top + size), slice(left, left + size))
        for size in range(side, 0, -1)
        for top, left in itertools.product(range(side - size + 1), repeat=2)
    ][:num_views]
    if len(boxes) < num_views:
        raise UserError(f"--views is {num_views}; a map of {side} x {side} has {len(boxes)} windows")
    vectors = np.empty((num_views, len(images), run.model.width), np.float16)
    batches = np.array_split(np.arange(len(images)), max(1, len(images) // 64))
    tail = cache.tail.eval()
    with progress(total=len(images), desc="windows", unit="image") as bar:
        for rows, (maps, _) in zip(batches, stored.eval_batches(batches), strict=True):
            for view, (height, width) in enumerate(boxes):
                vectors[view, rows] = tail.embed(maps[:, :, height, width]).cpu().numpy()
            bar.update(len(rows))
    return vectors.reshape(-1, run.model.width)


def build_index(name: str, database: np.ndarray, dim: int) -> Any:
    """Return a FAISS index of the normalized prefixes."""
    # FAISS compares sign bits by Hamming distance, which its factory calls L2.
    index = faiss.index_factory(dim, name, faiss.METRIC_L2 if "LSH" in name else faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit(database[thin_indices(len(database), 4 * ROWS)].astype(np.float32), dim))
    for first in range(0, len(database), ROWS):
        index.add(unit(database[first : first + ROWS].astype(np.float32), dim))
    return index


def contenders_of(
    sets: Sets, names: list[str], dims: list[int], shortlist_sizes: list[int]
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, float]]:
    """Build the indexes; return ``{name: search}`` and ``{name: bytes per vector of its index}``.

    Each search returns indices ``(Q, length)``, best first.
    """
    queries, _, database, _ = sets
    width = database.shape[1]
    flat, full_queries = build_index("Flat", database, width), unit(queries, width)
    contenders: dict[str, Callable[[], np.ndarray]] = {FULL: lambda: flat.search(full_queries, 1)[1]}
    num_bytes = {FULL: 4.0 * width}

    def search(index: Any, prefixes: np.ndarray, size: int) -> np.ndarray:
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = size
        if isinstance(index, faiss.IndexIVF):
            index.nprobe = NPROBE
        found = index.search(prefixes, size)[1]
        found = np.where(found < 0, found[:, :1], found)  # the lists of IVF may hold fewer
        return funnel(queries, database, found, [(width, size)])[0]

    for name, dim in itertools.product(names, dims):
        started = time.perf_counter()
        index = build_index(name, database, dim)
        report("index build", name=f"{name} at {dim}", seconds=round(time.perf_counter() - started, 1))
        per_vector = round(faiss.serialize_index(index).nbytes / len(database), 1)
        for size in shortlist_sizes:
            contender = f"{name} at {dim}, best {size} at {width}"
            contenders[contender] = functools.partial(search, index, unit(queries, dim), size)
            num_bytes[contender] = per_vector
    return contenders, num_bytes


def measure(
    sets: Sets, names: list[str], dims: list[int], shortlist_sizes: list[int], repeats: int, **about: Any
) -> None:
    """Report each contender, and the fastest that is as good as the full width."""
    queries, query_labels, database, labels = sets
    contenders, num_bytes = contenders_of(sets, names, dims, shortlist_sizes)
    timed = take_turns(contenders, repeats)
    about |= {"rows": len(database), "queries": len(queries), "width": database.shape[1]}
    right = {name: labels[own.answer[:, 0]] == query_labels for name, own in timed.items()}
    full, lines = timed[FULL], dict[str, dict[str, Any]]()
    for name, own in timed.items():
        milliseconds = round(1000 * statistics.median(own.seconds) / len(queries), 4)
        speed = ratios("speed_vs_full_width", full.seconds, own.seconds)
        lines[name] = {"name": name, "milliseconds_per_query": milliseconds, "bytes": num_bytes[name]} | speed
        report("adaptive retrieval", **lines[name], top_1=percent(right[name]), **about)
    # One of many contenders may be good by luck, so it is not judged by the queries that chose it.
    behind = {name: np.mean(right[FULL][0::2]) - np.mean(found[0::2]) for name, found in right.items()}
    as_good = [name for name in timed if behind[name] <= 0.001 + 1e-9]
    fastest = max(as_good, key=lambda name: lines[name]["speed_vs_full_width"])
    judged = {"top_1_of_the_others": percent(right[fastest][1::2]), "full_width": percent(right[FULL][1::2])}
    report("fastest at equal top-1 of every second query", **lines[fastest], **judged, **about)


def percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory that eval.py has embedded")
    add = parser.add_argument
    add("--views", type=int, default=1, help="vectors of each training image in the database")
    add("--num_queries", type=int, default=4000, help="queries, searched in one batch")
    add("--indexes", nargs="+", default=["Flat", "HNSW32"], help="FAISS indexes that find the shortlist")
    add("--shortlist_dims", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="prefixes that they hold")
    add("--shortlist_sizes", type=int, nargs="+", default=[50, 200], help="neighbors to rerank")
    add("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args(argv)
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        sets = embedded(open_run(args.run), args.views, args.num_queries)
        chosen = (args.indexes, args.shortlist_dims, args.shortlist_sizes, args.repeats)
        measure(sets, *chosen, run=args.run, views=args.views)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
