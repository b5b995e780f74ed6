"""Image retrieval and 1-NN at every prefix size (paper, sections 4.1 and 4.3, tables 2, 5, 8-10, figures 3, 5, 7)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mrl.errors import UserError
from mrl.results import Row, Source
from mrl.retrieval.metrics import hits, mflops_per_query, num_relevant, retrieval_metrics
from mrl.retrieval.search import exact_search

STUDY = "retrieval"
KS = (10, 25, 50, 100)


def interpolated_dims(nesting_list: Sequence[int]) -> tuple[int, ...]:
    """The size half-way between each two neighbors of ``nesting_list``: never trained (paper, figure 5).

    Where the list doubles, these are 1.5 times its sizes. Neighbors that differ by 1 have none between them.

    >>> interpolated_dims([8, 16, 32, 64])
    (12, 24, 48)
    """
    return tuple((small + large) // 2 for small, large in itertools.pairwise(nesting_list) if large - small > 1)


def retrieval(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims_by_method: Mapping[str, Sequence[int]],
    source: Source,
    *,
    ks: Sequence[int] = KS,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of top-1 (1-NN accuracy), top-k, map@k, precision@k and recall@k at each size, from one search.

    Cosine on unit prefixes; of equally near images the first in the database counts. An image is
    relevant if it has the query's label. A query whose class has no image in the database finds
    nothing and counts as 0 in every metric, so that all rows are means over the same queries.
    ``cost`` is the search's million multiply-adds per query. A ``k`` above the size of the database
    is left out, with a warning.

    Args:
        queries: Embeddings ``(Q, D)`` of the validation images, raw.
        query_labels: ``(Q,)`` whole numbers.
        database: Embeddings ``(N, D)`` of the training images, raw.
        database_labels: ``(N,)`` whole numbers.
        dims_by_method: Prefix sizes, trained or not, for each method that the rows are to name.
        source: What the rows are of.
        ks: How many neighbors the metrics look at.
        device: Where to search.

    Raises:
        UserError: The labels do not fit the embeddings; or as `exact_search`.
    """
    check_labels(queries, query_labels, "queries")
    check_labels(database, database_labels, "database")
    fitting = [k for k in ks if k <= len(database)]
    if len(fitting) < len(ks):
        left_out = ", ".join(str(k) for k in ks if k not in fitting)
        warnings.warn(
            f"{source.run}: the database has {len(database)} images, so metrics at k = {left_out} are left out",
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
        source.row(STUDY, method, metric, value, len(queries), dim=dim, cost=mflops_per_query(len(database), dim, ()))
        for method, of_method in dims_by_method.items()
        for dim in of_method
        for metric, value in values[dim].items()
    ]


def thin(queries: np.ndarray, labels: np.ndarray, max_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Of more than ``max_queries`` queries and their labels that many, evenly spread from first to last, in memory.

    Raises:
        UserError: As `check_labels`; or ``max_queries`` is below 1.
    """
    check_labels(queries, labels, "queries")
    some = thin_rows(len(queries), max_queries)
    return np.array(queries[some]), labels[some]


def thin_rows(num_queries: int, max_queries: int) -> np.ndarray:
    """The rows int64, ascending, that `thin` takes of ``num_queries`` queries.

    Raises:
        UserError: ``max_queries`` is below 1.
    """
    if max_queries < 1:
        raise UserError(f"max_queries is {max_queries}; allowed: 1 or more")
    return np.linspace(0, num_queries - 1, min(max_queries, num_queries)).round().astype(np.int64)


def check_labels(vectors: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Nothing, once each of ``vectors`` is known to have one label, a whole number.

    Raises:
        UserError: There are no vectors, other numbers of labels than of vectors, or labels that are not whole numbers.
    """
    if not len(vectors) or labels.shape != (len(vectors),):
        raise UserError(f"the {name} are {len(vectors)} embeddings with labels {labels.shape}; give one label to each")
    if labels.dtype.kind not in "iu":
        # float16 keeps apart only 2,048 classes.
        raise UserError(f"the labels of the {name} are {labels.dtype}; allowed are whole numbers, such as int64")
