"""Image retrieval and 1-NN at every prefix size (paper, sections 4.1 and 4.3, tables 2, 5, 8-10, figures 3, 5, 7)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mrl.results import Row, Source
from mrl.retrieval.metrics import hits, mflops_per_query, num_relevant, retrieval_metrics
from mrl.retrieval.search import exact_search

STUDY = "retrieval"
KS = (10, 25, 50, 100)


def interpolated_dims(nesting_list: Sequence[int]) -> tuple[int, ...]:
    """Return the size half-way between each two neighbors of ``nesting_list``, which was never trained (figure 5).

    >>> interpolated_dims([8, 16, 32, 64])
    (12, 24, 48)
    """
    return tuple((small + large) // 2 for small, large in itertools.pairwise(nesting_list) if large - small > 1)


def thin_indices(n: int, max_n: int | None) -> np.ndarray:
    """Return up to ``max_n`` of ``n`` indices, evenly spread from first to last, int64; all of them for None.

    >>> thin_indices(11, 3).tolist()
    [0, 5, 10]
    """
    return np.linspace(0, n - 1, n if max_n is None else min(max_n, n)).round().astype(np.int64)


def retrieval(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims_by_method: Mapping[str, Sequence[int]],
    source: Source,
    *,
    ks: Sequence[int] = KS,
    max_queries: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows of top-1 (1-NN accuracy), top-k, map@k, precision@k and recall@k at each size, from one search.

    Similarity is the cosine of prefixes of raw embeddings; of equally near images, the first in the database comes
    first. An image is relevant if it has the query's label. A query whose class is not in the database counts as 0, so
    that all rows are means over the same queries. ``cost`` is the search's million multiply-adds per query.

    Args:
        queries, query_labels: ``(Q, D)`` and ``(Q,)`` int64.
        database, database_labels: ``(N, D)`` and ``(N,)`` int64.
        dims_by_method: Prefix sizes, trained or not, for each method of the rows.
        ks: Numbers of neighbors for the metrics. Those above N are left out, with a warning.
        max_queries: Use only this many queries; see `thin_indices`.
    """
    chosen = thin_indices(len(queries), max_queries)
    queries, query_labels = queries[chosen], query_labels[chosen]
    fitting = [k for k in ks if k <= len(database)]
    if left_out := [str(k) for k in ks if k > len(database)]:
        warnings.warn(
            f"{source.run}: the database has {len(database)} images, so metrics at k = {', '.join(left_out)} are "
            "left out",
            stacklevel=2,
        )
    dims = sorted({dim for of_method in dims_by_method.values() for dim in of_method})
    found = exact_search(queries, database, max(fitting, default=1), dims, device=device, progress=True)
    relevant = num_relevant(query_labels, database_labels)
    values = {
        dim: retrieval_metrics(hits(indices, query_labels, database_labels), relevant, fitting)
        for dim, (indices, _) in found.items()
    }
    return [
        source.row(STUDY, method, metric, value, len(queries), dim=dim, cost=mflops_per_query(len(database), dim))
        for method, of_method in dims_by_method.items()
        for dim in of_method
        for metric, value in values[dim].items()
    ]
