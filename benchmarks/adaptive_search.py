"""Measure the time that adaptive retrieval saves over exact FAISS at full width.

    python -m benchmarks.adaptive_search --run runs/tiny_imagenet_mrl --mirrored

Prints one JSON line per contender: milliseconds per query, speed relative to the full width, and 1-NN top-1 in percent.
The last line is the fastest contender that is at most 0.1 points behind the full width on every second query, with its
top-1 on the other queries. Contenders take turns; ratios are medians of the ratios of each repeat.

A contender finds a shortlist on a prefix, by exact FAISS or by FAISS's HNSW graph (efSearch is the shortlist's size).
`funnel` reranks it at four times that prefix, and the best 50 of it at full width. Shortlists of 50 or fewer, and
prefixes of which four times are the full width or more, are reranked at full width at once.

The queries and the database are the embeddings of the run's val and train images that eval.py left, with --mirrored
also of the mirrored training images, which are embedded if necessary. Needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.search import faiss, flat_index, unit
from benchmarks.timing import ratios, report, take_turns
from mrl import distributed
from mrl.data import build_data
from mrl.errors import UserError
from mrl.retrieval.embeddings import EmbeddingSet, embed_split, embeddings_path
from mrl.retrieval.rerank import funnel
from mrl.studies.retrieval import thin_indices
from mrl.studies.run import OpenedRun, open_run

FULL = "faiss full width"
LAST_LENGTH = 50

Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # queries, their labels, database, its labels


def embedded(run: OpenedRun, mirrored: bool, num_queries: int) -> Sets:
    """Return the embeddings and labels of a run, with evenly spread queries."""
    database = [run.train, embed_mirrored(run)] if mirrored else [run.train]
    some = thin_indices(len(run.val.labels), num_queries)
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
    width = database.shape[1]
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
    timed = take_turns(contenders_of(sets, dims, shortlist_sizes), repeats)
    about |= {"rows": len(database), "queries": len(queries), "width": database.shape[1]}
    right = {name: labels[own.answer[:, 0]] == query_labels for name, own in timed.items()}
    full, lines = timed[FULL], dict[str, dict[str, Any]]()
    for name, own in timed.items():
        milliseconds = round(1000 * statistics.median(own.seconds) / len(queries), 4)
        speed = ratios("speed_vs_full_width", full.seconds, own.seconds)
        lines[name] = {"name": name, "milliseconds_per_query": milliseconds} | speed
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
    parser.add_argument("--mirrored", action="store_true", help="add mirrored training images to the database")
    parser.add_argument("--num_queries", type=int, default=4000, help="queries, searched in one batch")
    parser.add_argument("--shortlist_sizes", type=int, nargs="+", default=[50, 200], help="neighbors to rerank")
    parser.add_argument("--shortlist_dims", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="first prefixes")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args(argv)
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        sets = embedded(open_run(args.run), args.mirrored, args.num_queries)
        measure(sets, args.shortlist_dims, args.shortlist_sizes, args.repeats, run=args.run, mirrored=args.mirrored)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
