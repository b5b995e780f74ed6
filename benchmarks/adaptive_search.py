"""What adaptive retrieval saves in time: a shortlist on a small prefix and a funnel, beside exact full-width FAISS.

    python -m benchmarks.adaptive_search                                          # 200,000 synthetic vectors
    python -m benchmarks.adaptive_search --run runs/tiny_imagenet_mrl --mirrored  # a trained model's embeddings

Prints one JSON line a contender: milliseconds a query, how many times faster than the full width, and 1-NN top-1 in
percent. Last comes the fastest that is at most 0.1 point behind the full width on every second query, with its top-1 on
the others. The contenders take turns within each repeat; ratios are medians of the ratios of each repeat. A contender
finds a shortlist on a prefix, by exact FAISS or FAISS's HNSW graph (efSearch is the shortlist's size), which `funnel`
orders at four times that prefix and, the best 50 of them, at full width; a shortlist of 50 or less, or where four times
the prefix is the full width or more, is ordered at full width at once.

``--run`` takes the embeddings that eval.py has left in a run directory: val are the queries, train the database, with
``--mirrored`` the mirrored training images too, which are embedded if they are not yet. Without it embeddings are
synthetic: each class has a center whose coordinates are normal with a standard deviation that falls as 1 / sqrt(1 + i),
so that, as in a trained nested embedding, early coordinates say most, and an image is its center plus noise of the same
shape times ``--noise``. Needs faiss (pip install faiss-cpu).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.search import faiss, flat_index, report, take_turns, unit
from mrl import distributed
from mrl.config import read_config
from mrl.data import build_data
from mrl.errors import UserError
from mrl.model import load
from mrl.retrieval.embeddings import EmbeddingMetadata, embed_split, embeddings_path, file_sha256
from mrl.retrieval.rerank import funnel
from mrl.studies.run import refuse_other_classes

FULL = "faiss full width"
LAST_LENGTH = 50

Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # queries, their classes, database, its classes


def clustered(num_queries: int, num_rows: int, width: int, num_classes: int, noise: float) -> Sets:
    """Synthetic embeddings; see the module."""
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


def embedded(run: Path, mirrored: bool, num_queries: int) -> Sets:
    """A run's embeddings and labels as eval.py keeps them; of the queries some, evenly spread.

    Raises:
        UserError: eval.py has not embedded the run's images with the weights that it has now.
    """
    folders = [embeddings_path(run, "val"), embeddings_path(run, "train")]
    for folder in folders:
        path = folder / "metadata.json"
        if not path.is_file() or metadata_of(folder).checkpoint_sha256 != file_sha256(run / "model.safetensors"):
            raise UserError(
                f"{folder} holds no finished embeddings of the run's weights; first run: python eval.py --runs {run}"
            )
    if mirrored:
        folders.append(embed_mirrored(run))
    vectors = [np.load(folder / "vectors.npy", mmap_mode="r") for folder in folders]
    labels = [np.load(folder / "labels.npy") for folder in folders]
    some = np.linspace(0, len(labels[0]) - 1, min(num_queries, len(labels[0]))).astype(np.int64)
    return np.array(vectors[0][some]), labels[0][some], np.concatenate(vectors[1:]), np.concatenate(labels[1:])


def metadata_of(folder: Path) -> EmbeddingMetadata:
    """What the embeddings in ``folder`` are of."""
    return EmbeddingMetadata(**json.loads((folder / "metadata.json").read_text()))


def embed_mirrored(run: Path) -> Path:
    """Where the embeddings of the mirrored training images are, which are made as eval.py has made the others."""
    metadata = dataclasses.replace(metadata_of(embeddings_path(run, "train")), flip=True)
    folder = embeddings_path(run, "train", flip=True)
    process = distributed.start()
    config, model = read_config(run / "config.yaml"), load(run)
    images = build_data(config.data, config.run.seed, process.device, False, splits=("train",))["train"]
    refuse_other_classes(run.name, model.info.classes, images.classes)  # type: ignore[union-attr]
    model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    embed_split(folder, metadata, images, model.embed, model.width, process, batch_size=256)
    return folder


def contenders_of(sets: Sets, dims: list[int], shortlist_sizes: list[int]) -> dict[str, Callable[[], np.ndarray]]:
    """``{name: search}``; each search returns the best rows first, ``(Q, length)``. Their indexes are built here.

    Raises:
        UserError: A prefix is not smaller than the full width, or a shortlist is larger than the database.
    """
    queries, _, database, _ = sets
    num_rows, width = database.shape
    if not all(1 <= dim < width for dim in dims):
        raise UserError(f"--shortlist_dims {dims} must be 1 to {width - 1}, below the full width")
    if not all(1 <= size <= num_rows for size in shortlist_sizes):
        raise UserError(f"--shortlist_sizes {shortlist_sizes} must be 1 to {num_rows}, the vectors of the database")
    index, full_queries = flat_index(database, width), unit(queries, width)
    contenders: dict[str, Callable[[], np.ndarray]] = {FULL: lambda: index.search(full_queries, 1)[1]}

    def search(of: Any, given: np.ndarray, stages: list[tuple[int, int]]) -> np.ndarray:
        shortlist_size = stages[0][1]
        if isinstance(of, faiss.IndexHNSW):
            of.hnsw.efSearch = shortlist_size
        return funnel(queries, database, of.search(given, shortlist_size)[1], stages)[0]

    for dim in dims:
        prefixes, of_queries = unit(database, dim), unit(queries, dim)
        exact, graph = faiss.IndexFlatIP(dim), faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        exact.add(prefixes)
        started = time.perf_counter()
        graph.add(prefixes)
        report("index build", name=f"HNSW32 at {dim}", seconds=round(time.perf_counter() - started, 1))
        for size in shortlist_sizes:
            twice = size > LAST_LENGTH and 4 * dim < width
            stages = [(4 * dim, size), (width, LAST_LENGTH)] if twice else [(width, size)]
            for kind, of in (("faiss exact", exact), ("HNSW32", graph)):
                contenders[f"{kind} at {dim}, funnel {stages}"] = functools.partial(search, of, of_queries, stages)
    return contenders


def measure(sets: Sets, dims: list[int], shortlist_sizes: list[int], repeats: int, **about: Any) -> None:
    """One line a contender, and one of the fastest that is as good as the full width."""
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
    # Of many contenders one is as good by luck: the queries that choose it are not those that it is then judged by.
    choosing = {name: int(of_queries[0::2].sum()) for name, of_queries in right.items()}
    as_good = [name for name in answers if 1000 * (choosing[FULL] - choosing[name]) <= len(right[name][0::2])]
    fastest = max(as_good, key=lambda name: statistics.median(speeds[name]))
    judged = {"top_1_of_the_others": percent(right[fastest][1::2]), "full_width": percent(right[FULL][1::2])}
    report("fastest at equal top-1 of every second query", name=fastest, **times[fastest], **judged, **about)


def percent(right: np.ndarray) -> float:
    """Top-1 accuracy in percent."""
    return round(100 * float(right.mean()), 2)


def main(argv: list[str] | None = None) -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory whose embeddings are searched; default: synthetic ones")
    parser.add_argument("--mirrored", action="store_true", help="with --run: mirrored training images in the database")
    parser.add_argument("--num_queries", type=int, default=4000, help="queries, searched at once")
    parser.add_argument("--shortlist_sizes", type=int, nargs="+", default=[50, 200], help="neighbors handed on")
    parser.add_argument("--shortlist_dims", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="first prefixes")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    parser.add_argument("--rows", type=int, default=200_000, help="synthetic: database vectors")
    parser.add_argument("--width", type=int, default=2048, help="synthetic: coordinates of an embedding")
    parser.add_argument("--classes", type=int, default=1000, help="synthetic: classes")
    parser.add_argument("--noise", type=float, default=1.5, help="synthetic: spread within a class over that between")
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
            sets = embedded(args.run, args.mirrored, args.num_queries)
        measure(sets, args.shortlist_dims, args.shortlist_sizes, args.repeats, **about)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
