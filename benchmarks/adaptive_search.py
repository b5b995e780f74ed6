"""Measure the time that adaptive retrieval saves over exact FAISS at full width.

    python -m benchmarks.adaptive_search                                          # 200,000 synthetic vectors
    python -m benchmarks.adaptive_search --run runs/tiny_imagenet_mrl --mirrored  # a trained model's embeddings

Prints one JSON line per contender: milliseconds per query, speed relative to the full width, and 1-NN top-1 in percent.
The last line is the fastest contender that is at most 0.1 points behind the full width on every second query, with its
top-1 on the other queries. Contenders take turns; ratios are medians of the ratios of each repeat.

A contender finds a shortlist on a prefix, by exact FAISS or by FAISS's HNSW graph (efSearch is the shortlist's size).
`funnel` reranks it at four times that prefix, and the best 50 of it at full width. Shortlists of 50 or fewer, and
prefixes of which four times are the full width or more, are reranked at full width at once.

--run takes the embeddings that eval.py left in a run directory: val are the queries and train the database, with
--mirrored also the mirrored training images, which are embedded if necessary. Synthetic embeddings are class centers
plus noise, where the standard deviation of coordinate i falls as 1 / sqrt(1 + i). Needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.search import faiss, flat_index, report, take_turns, unit
from mrl import distributed
from mrl.data import build_data
from mrl.errors import UserError
from mrl.retrieval.embeddings import EmbeddingSet, embed_split, embeddings_path
from mrl.retrieval.rerank import funnel
from mrl.studies.run import OpenedRun, open_run

FULL = "faiss full width"
LAST_LENGTH = 50

Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # queries, their labels, database, its labels


def clustered(num_queries: int, num_rows: int, width: int, num_classes: int, noise: float) -> Sets:
    """Return synthetic embeddings."""
    rng = np.random.default_rng(0)
    falling = (1 / np.sqrt(1 + np.arange(width))).astype(np.float32)
    centers = rng.standard_normal((num_classes, width), dtype=np.float32)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(num_classes, size=count)
        vectors = rng.standard_normal((count, width), dtype=np.float32)
        vectors *= noise
        vectors += centers[labels]
        vectors *= falling
        return vectors, labels

    return *images(num_queries), *images(num_rows)


def embedded(run: OpenedRun, mirrored: bool, num_queries: int) -> Sets:
    """Return the embeddings and labels of a run, with evenly spread queries."""
    database = [run.train, embed_mirrored(run)] if mirrored else [run.train]
    some = np.linspace(0, len(run.val.labels) - 1, min(num_queries, len(run.val.labels))).astype(np.int64)
    vectors, labels = (np.concatenate([getattr(part, name) for part in database]) for name in ("vectors", "labels"))
    return np.array(run.val.vectors[some]), run.val.labels[some], vectors, labels


def embed_mirrored(run: OpenedRun) -> EmbeddingSet:
    """Return the embeddings of the mirrored training images, computed as eval.py computes the others."""
    metadata = dataclasses.replace(run.train.metadata, flip=True)
    folder = embeddings_path(run.directory, "train", flip=True)
    process = distributed.start()
    images = build_data(run.config.data, run.config.run.seed, process.device, False, splits=("train",))["train"]
    model = run.model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return embed_split(folder, metadata, images, model.embed, model.width, process, batch_size=256)


def contenders_of(sets: Sets, dims: list[int], shortlist_sizes: list[int]) -> dict[str, Callable[[], np.ndarray]]:
    """Build the indexes and return ``{name: search}``; each search returns indices ``(Q, length)``, best first."""
    queries, _, database, _ = sets
    num_rows, width = database.shape
    if not all(1 <= dim < width for dim in dims):
        raise UserError(f"--shortlist_dims {dims} must be 1 to {width - 1}, below the full width")
    if not all(1 <= size <= num_rows for size in shortlist_sizes):
        raise UserError(f"--shortlist_sizes {shortlist_sizes} must be 1 to {num_rows}, the vectors of the database")
    index, full_queries = flat_index(database, width), unit(queries, width)
    contenders: dict[str, Callable[[], np.ndarray]] = {FULL: lambda: index.search(full_queries, 1)[1]}

    def search(index: Any, prefixes: np.ndarray, stages: list[tuple[int, int]]) -> np.ndarray:
        shortlist_size = stages[0][1]
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = shortlist_size
        return funnel(queries, database, index.search(prefixes, shortlist_size)[1], stages)[0]

    for dim in dims:
        exact, graph = flat_index(database, dim), faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        started = time.perf_counter()
        graph.add(unit(database, dim))
        report("index build", name=f"HNSW32 at {dim}", seconds=round(time.perf_counter() - started, 1))
        for size in shortlist_sizes:
            twice = size > LAST_LENGTH and 4 * dim < width
            stages = [(4 * dim, size), (width, LAST_LENGTH)] if twice else [(width, size)]
            for kind, of_prefixes in (("faiss exact", exact), ("HNSW32", graph)):
                contender = functools.partial(search, of_prefixes, unit(queries, dim), stages)
                contenders[f"{kind} at {dim}, funnel {stages}"] = contender
    return contenders


def measure(sets: Sets, dims: list[int], shortlist_sizes: list[int], repeats: int, **about: Any) -> None:
    """Report each contender, and the fastest that is as good as the full width."""
    queries, query_labels, database, labels = sets
    seconds, answers = take_turns(contenders_of(sets, dims, shortlist_sizes), repeats)
    about |= {"rows": len(database), "queries": len(queries), "width": database.shape[1]}
    right = {name: labels[found[:, 0]] == query_labels for name, found in answers.items()}
    speeds = {
        name: [full / own for full, own in zip(seconds[FULL], values, strict=True)] for name, values in seconds.items()
    }
    times = {
        name: {
            "milliseconds_per_query": round(1000 * statistics.median(seconds[name]) / len(queries), 4),
            "speed_vs_full_width": round(statistics.median(speeds[name]), 1),
            "range": [round(min(speeds[name]), 1), round(max(speeds[name]), 1)],
        }
        for name in answers
    }
    for name in answers:
        report("adaptive retrieval", name=name, **times[name], top_1=percent(right[name]), **about)
    # One of many contenders may be good by luck, so it is not judged by the queries that chose it.
    choosing = {name: int(of_queries[0::2].sum()) for name, of_queries in right.items()}
    as_good = [name for name in answers if 1000 * (choosing[FULL] - choosing[name]) <= len(right[name][0::2])]
    fastest = max(as_good, key=lambda name: statistics.median(speeds[name]))
    judged = {"top_1_of_the_others": percent(right[fastest][1::2]), "full_width": percent(right[FULL][1::2])}
    report("fastest at equal top-1 of every second query", name=fastest, **times[fastest], **judged, **about)


def percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory with embeddings; default: synthetic ones")
    parser.add_argument("--mirrored", action="store_true", help="with --run: add mirrored training images")
    parser.add_argument("--num_queries", type=int, default=4000, help="queries, searched in one batch")
    parser.add_argument("--shortlist_sizes", type=int, nargs="+", default=[50, 200], help="neighbors to rerank")
    parser.add_argument("--shortlist_dims", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="first prefixes")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    parser.add_argument("--rows", type=int, default=200_000, help="synthetic: database vectors")
    parser.add_argument("--width", type=int, default=2048, help="synthetic: coordinates of an embedding")
    parser.add_argument("--classes", type=int, default=1000, help="synthetic: classes")
    parser.add_argument("--noise", type=float, default=1.5, help="synthetic: std within a class over that between")
    args = parser.parse_args(argv)
    if args.mirrored and args.run is None:
        parser.error("--mirrored needs --run")
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        if args.run is None:
            about: dict[str, Any] = {"classes": args.classes, "noise": args.noise}
            sets = clustered(args.num_queries, args.rows, args.width, args.classes, args.noise)
        else:
            about = {"run": args.run.name, "mirrored": args.mirrored}
            sets = embedded(open_run(args.run), args.mirrored, args.num_queries)
        measure(sets, args.shortlist_dims, args.shortlist_sizes, args.repeats, **about)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
