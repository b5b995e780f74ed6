"""Adaptive and funnel retrieval, quality against cost (paper, section 4.3.1, tables 11-14, 30, 31, figure 8)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mrl.progress import progress
from mrl.results import Row, Source
from mrl.retrieval.metrics import hits, mflops_per_query, num_relevant, retrieval_metrics
from mrl.retrieval.rerank import rerank
from mrl.retrieval.search import exact_search
from mrl.studies.retrieval import thin_indices

STUDY, FUNNEL_STUDY = "adaptive_retrieval", "funnel_retrieval"
SHORTLIST_SIZE = 200
ABLATION_DIM = 16
ABLATION_SIZES = (100, 200, 400, 800, 1600, 2048)
FUNNEL_LENGTHS = ((200, 100, 50, 25, 10), (400, 200, 50, 25, 10), (800, 400, 200, 50, 10))
FUNNEL_STARTS = 3
K = 10
Stages = tuple[tuple[int, int], ...]  # the (dim, length) of each reranking
Plan = tuple[int, Stages]  # the prefix size of the search first


def pairs(nesting_list: Sequence[int], database_size: int) -> list[Plan]:
    """Return every search size combined with every rerank size from there up (tables 11 and 12)."""
    length = min(SHORTLIST_SIZE, database_size)
    return [(small, ((dim, length),)) for small in nesting_list for dim in nesting_list if dim >= small]


def ablation(nesting_list: Sequence[int], database_size: int) -> list[Plan]:
    """Return searches at 16 dims whose shortlists of 100 to 2,048 are reranked at full width (tables 30 and 31).

    If 16 is not in the list, its second size takes that place. Shortlists longer than the database are left out, and
    so is the length that `pairs` already has.
    """
    dim = ABLATION_DIM if ABLATION_DIM in nesting_list else [*nesting_list[:2]][-1]
    sizes = [size for size in ABLATION_SIZES if size <= database_size and size != min(SHORTLIST_SIZE, database_size)]
    return [(dim, ((nesting_list[-1], size),)) for size in sizes if dim != nesting_list[-1]]


def funnels(nesting_list: Sequence[int], database_size: int) -> list[Plan]:
    """Return the funnels of tables 13 and 14 for any nesting list.

    Each starts at one of the three smallest sizes and passes through up to four next sizes to the full width, from
    200, 400 or 800 images down to 10. With fewer sizes, the shortest lists before the last are left out. A funnel has
    at least two rerankings and no list longer than the database.

    >>> funnels([8, 16, 32, 64, 128, 256, 512, 1024, 2048], 1_281_167)[0]
    (8, ((16, 200), (32, 100), (64, 50), (128, 25), (2048, 10)))
    """
    plans: list[Plan] = []
    for position, start in enumerate(nesting_list[:-2][:FUNNEL_STARTS]):
        dims = [*nesting_list[position + 1 : -1][:4], nesting_list[-1]]
        for lengths in FUNNEL_LENGTHS:
            if lengths[0] <= database_size:
                plans.append((start, tuple(zip(dims, [*lengths[: len(dims) - 1], lengths[-1]], strict=True))))
    return plans


def adaptive_retrieval(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    nesting_list: Sequence[int],
    source: Source,
    method: str,
    *,
    max_queries: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows of top-1 and map@10 of all `pairs`, of the `ablation` and, as "funnel_retrieval", of the `funnels`.

    ``cost`` counts every stage, as the paper does also for a rerank at the search size; that one is not computed,
    because it would not change the order. ``ms_per_query`` is the measured time of searches and rerankings, all
    queries in one batch and the database already read; None unless all of it ran on the CPU. Searches run on
    ``device``, reranking on the CPU. Other arguments as in `retrieval`.
    """
    chosen = thin_indices(len(queries), max_queries)
    queries, query_labels = queries[chosen], query_labels[chosen]
    relevant = num_relevant(query_labels, database_labels)
    plans = [(STUDY, *plan) for plan in pairs(nesting_list, len(database)) + ablation(nesting_list, len(database))]
    plans += [(FUNNEL_STUDY, *plan) for plan in funnels(nesting_list, len(database))]
    by_search = sorted(plans, key=_search)

    def search(dim: int, k: int) -> np.ndarray:
        return exact_search(queries, database, k, [dim], device=device)[dim][0]

    def rerank_stages(shortlist: np.ndarray, searched: int, stages: Stages) -> np.ndarray:
        for dim, length in stages:
            if dim != searched:
                shortlist = rerank(queries, database, shortlist[:, :length], dim)
        return shortlist

    # Read the whole database once, so that no measured time includes the disk.
    exact_search(queries[:1], database, 1, [database.shape[1]], device=device, progress=True)
    on_cpu = torch.device(device).type == "cpu"
    rows = []
    with progress(total=len(plans), desc=f"{source.run}: {STUDY}", unit="configuration") as bar:
        for (dim, size), of_search in itertools.groupby(by_search, key=_search):
            shortlist, search_seconds = timed(search, dim, size)
            for study, _, stages in of_search:
                indices, seconds = timed(rerank_stages, shortlist, dim, stages)
                hit = hits(indices[:, :K], query_labels, database_labels)
                values = retrieval_metrics(hit, relevant, [K] if hit.shape[1] == K else [])  # the database may be small
                about = {
                    **{"shortlist_dim": dim, "shortlist_size": size, "rerank_dim": stages[-1][0]},
                    "cost": mflops_per_query(len(database), dim, stages),
                    "ms_per_query": 1000 * (search_seconds + seconds) / len(queries) if on_cpu else None,
                }
                metrics = [metric for metric in ("top_1", f"map@{K}") if metric in values]
                rows += [source.row(study, method, metric, values[metric], len(queries), **about) for metric in metrics]
                bar.update()
    return rows


def describe_retrieval(rows: Sequence[Row]) -> str:
    """Return the smallest size whose shortlist, reranked at full width, is within a point of a search at full width."""
    metric = f"map@{K}"
    found = [row for row in rows if row.study == STUDY and row.metric == metric]
    length = max(found, key=lambda row: row.shortlist_dim or 0).shortlist_size  # the ablation has others
    of_search = {
        (int(row.shortlist_dim or 0), int(row.rerank_dim or 0)): row.value
        for row in found
        if row.shortlist_size == length
    }
    width = max(dim for dim, _ in of_search)
    full, least = of_search[width, width], min(dim for dim, _ in of_search)
    enough = min(dim for dim, last in of_search if last == width and of_search[dim, last] >= full - 0.01)
    return (
        f"{metric} of a search at full width, {width} dims: {full:.1%}; at {least} dims {of_search[least, least]:.1%}, "
        f"and {of_search[least, width]:.1%} if its best {length} are reranked at full width. After such a reranking, "
        f"{enough} dims are the smallest searched size within 1 point of full width."
    )


def _search(plan: tuple[str, int, Stages]) -> tuple[int, int]:
    """Return dim and length of the search that a plan starts with."""
    return plan[1], plan[2][0][1]


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result and the shortest time in seconds of up to three calls; only one if it takes a second."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 1:
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)
