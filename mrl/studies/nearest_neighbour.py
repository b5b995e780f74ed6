"""1-NN accuracy at every prefix size (paper, section 4.1, table 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mrl.results import Row, Source
from mrl.retrieval.search import exact_search

STUDY = "nearest_neighbour"


def nearest_neighbour(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims_by_method: Mapping[str, Sequence[int]],
    source: Source,
    *,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of top-1: the share of queries whose nearest database image has their label, at each size.

    Cosine on unit prefixes; of equally near images the first in the database counts. ``cost`` is
    the search's million multiply-adds per query.

    Args:
        queries: Embeddings ``(Q, D)`` of the validation images, raw.
        query_labels: ``(Q,)`` int64.
        database: Embeddings ``(N, D)`` of the training images, raw.
        database_labels: ``(N,)`` int64.
        dims_by_method: Prefix sizes for each method that the rows are to name.
        source: What the rows are of.
        device: Where to search.

    Raises:
        UserError: As `exact_search`.
    """
    dims = sorted({dim for of_method in dims_by_method.values() for dim in of_method})
    found = exact_search(queries, database, 1, dims, device=device, progress=True)
    correct = {dim: int((database_labels[indices[:, 0]] == query_labels).sum()) for dim, (indices, _) in found.items()}
    return [
        source.row(
            STUDY, method, "top_1", correct[dim] / len(queries), len(queries), dim=dim, cost=dim * len(database) / 1e6
        )
        for method, of_method in dims_by_method.items()
        for dim in of_method
    ]
