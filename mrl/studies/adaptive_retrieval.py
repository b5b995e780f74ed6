"""Adaptive and funnel retrieval, quality against cost (paper, section 4.3.1, tables 11-14, 30, 31, figure 8)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mrl.matryoshka import check_nesting_list
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.retrieval.metrics import hits, mean_average_precision, mflops_per_query, num_relevant, top_k_hit
from mrl.retrieval.rerank import rerank
from mrl.retrieval.search import exact_search
from mrl.studies.retrieval import check_labels, thin

STUDY = "adaptive_retrieval"
FUNNEL_STUDY = "funnel_retrieval"
SHORTLIST_SIZE = 200
ABLATION_DIM = 16
ABLATION_SIZES = (100, 200, 400, 800, 1600, 2048)
FUNNEL_LENGTHS = ((200, 100, 50, 25, 10), (400, 200, 50, 25, 10), (800, 400, 200, 50, 10))
FUNNEL_STARTS = 3
K = 10
LONG_SECONDS = 10.0

Stages = tuple[tuple[int, int], ...]
Plan = tuple[int, Stages]  # size of the search, then what follows it


def pairs(nesting_list: Sequence[int], num_rows: int) -> list[Plan]:
    """Every size of the search with every size of reranking from there up (tables 11 and 12): ``(dim, stages)``."""
    length = min(SHORTLIST_SIZE, num_rows)
    return [(small, ((dim, length),)) for small in nesting_list for dim in nesting_list if dim >= small]


def ablation(nesting_list: Sequence[int], num_rows: int) -> list[Plan]:
    """Shortlists of 100 to 2,048 found at 16 dims and reranked at full width (tables 30 and 31): ``(dim, stages)``.

    The search is at the second size where 16 is not one. Shortlists longer than the database are left
    out, and so is the one that is among `pairs`; nothing is left where no larger size is there to rerank at.
    """
    dim = ABLATION_DIM if ABLATION_DIM in nesting_list else nesting_list[min(1, len(nesting_list) - 1)]
    if dim == nesting_list[-1]:
        return []
    sizes = [size for size in ABLATION_SIZES if size <= num_rows and size != min(SHORTLIST_SIZE, num_rows)]
    return [(dim, ((nesting_list[-1], size),)) for size in sizes]


def funnels(nesting_list: Sequence[int], num_rows: int) -> list[Plan]:
    """The funnels of tables 13 and 14 for any nesting list: ``(dim, stages)``, a stage ``(dim, length)``.

    Each starts at one of the three smallest sizes and goes through up to four next sizes to the full
    width, from 200, 400 or 800 images down to 10. With fewer sizes the shortest lists before the last
    are left out; a start with only the full width above it is no funnel, nor is one with lists longer
    than the database.

    >>> funnels([8, 16, 32, 64, 128, 256, 512, 1024, 2048], 1_281_167)[0]
    (8, ((16, 200), (32, 100), (64, 50), (128, 25), (2048, 10)))
    """
    plans = []
    for place, start in enumerate(nesting_list[:FUNNEL_STARTS]):
        dims = [*nesting_list[place + 1 : -1][:4], nesting_list[-1]]
        if place + 2 >= len(nesting_list):
            continue
        for all_lengths in FUNNEL_LENGTHS:
            lengths = [*all_lengths[: len(dims) - 1], all_lengths[-1]]
            if lengths[0] <= num_rows:
                plans.append((start, tuple(zip(dims, lengths, strict=True))))
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
    max_queries: int = 1000,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of top-1 and map@10 of all `pairs`, of the `ablation` and, as study "funnel_retrieval", of the `funnels`.

    A row names the size of the search (shortlist_dim), how many images it hands on (shortlist_size)
    and the size of the last reranking (rerank_dim). ``cost`` counts every stage, as the paper does
    also where shortlist_dim and rerank_dim are equal; there nothing is reranked, for the order would
    stay. ``ms_per_query`` is the time of the search and of the rerankings, with all queries in one
    batch and the embeddings read from disk before, the shortest of up to three times where these are
    quick; None unless all of it ran on the CPU.

    Args:
        queries: Embeddings ``(Q, D)`` of the validation images, raw.
        query_labels: ``(Q,)`` whole numbers.
        database: Embeddings ``(N, D)`` of the training images, raw.
        database_labels: ``(N,)`` whole numbers.
        nesting_list: Sizes to search and rerank at, ascending.
        source: What the rows are of.
        method: The rows' method.
        max_queries: Of more queries, this many are taken, evenly spread; ``n`` tells.
        device: Where to search; reranking runs on the CPU.

    Raises:
        UserError: The labels do not fit the embeddings, the nesting list is not one; or as `exact_search`.
    """
    queries, query_labels = thin(queries, query_labels, max_queries)
    check_labels(database, database_labels, "database")
    nesting_list, num_rows = check_nesting_list(nesting_list, database.shape[1]), len(database)
    studies = {
        STUDY: pairs(nesting_list, num_rows) + ablation(nesting_list, num_rows),
        FUNNEL_STUDY: funnels(nesting_list, num_rows),
    }
    plans = [(study, *plan) for study, of_study in studies.items() for plan in of_study]
    plans.sort(key=lambda plan: (plan[1], plan[2][0][1]))
    relevant = num_relevant(query_labels, database_labels)
    # Reads the whole database once, so that no search's time is that of the disk, and finds what is not finite.
    exact_search(queries[:1], database, 1, [database.shape[1]], device=device, progress=True)
    rows = []
    with progress(total=len(plans), desc=f"{source.run}: {STUDY}", unit="configuration") as bar:
        # Plans that begin with the same search share it.
        for (dim, size), group in itertools.groupby(plans, key=lambda plan: (plan[1], plan[2][0][1])):
            shortlist, search_seconds = _timed(_search, queries, database, size, dim, device)
            for study, _, stages in group:
                indices, rerank_seconds = _timed(_rerank, queries, database, shortlist, dim, stages)
                on_cpu = torch.device(device).type == "cpu"
                shared = {
                    "shortlist_dim": dim,
                    "shortlist_size": size,
                    "rerank_dim": stages[-1][0],
                    "cost": mflops_per_query(num_rows, dim, stages),
                    "ms_per_query": 1000 * (search_seconds + rerank_seconds) / len(queries) if on_cpu else None,
                }
                rows += [
                    source.row(study, method, metric, value, len(queries), **shared)
                    for metric, value in _values(hits(indices[:, :K], query_labels, database_labels), relevant).items()
                ]
                bar.update()
    return rows


def _values(hit: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    values = {"top_1": top_k_hit(hit, 1)}
    if hit.shape[1] == K:  # a database may be smaller
        values[f"map@{K}"] = mean_average_precision(hit, relevant, K)
    return values


def _search(queries: np.ndarray, database: np.ndarray, k: int, dim: int, device: torch.device | str) -> np.ndarray:
    return exact_search(queries, database, k, [dim], device=device)[dim][0]  # which reads no more than the prefix


def _rerank(queries: np.ndarray, database: np.ndarray, shortlist: np.ndarray, dim: int, stages: Stages) -> np.ndarray:
    """Neighbors after all stages on a shortlist found at ``dim``, which stays as it is."""
    for rerank_dim, length in stages:
        if rerank_dim != dim:
            shortlist = rerank(queries, database, shortlist[:, :length], rerank_dim)
    return shortlist


def _timed(function: Callable[..., np.ndarray], *arguments: Any) -> tuple[np.ndarray, float]:
    """What ``function`` gives, and the seconds that it takes: the shortest of two, of three where they are short.

    A single one would keep whatever else the machine did meanwhile, unless it lasts: then that is a small share.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < 2 and seconds[0] < LONG_SECONDS) or (len(seconds) < 3 and sum(seconds) < 0.5):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)
