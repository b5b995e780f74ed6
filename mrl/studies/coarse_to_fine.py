"""The same queries at growing prefix sizes: which neighbours come, and which queries show the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mrl.errors import UserError
from mrl.retrieval.search import Neighbours

NUM_SHOWN = 4


def shown_sizes(dims: Sequence[int]) -> list[int]:
    """Up to four of ``dims`` for a picture: the smallest, every second after it, and the largest.

    >>> shown_sizes([8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    [8, 32, 128, 2048]
    """
    return sorted({*dims[:-1:2][: NUM_SHOWN - 1], dims[-1]})


def telling_queries(
    found: Mapping[int, Neighbours], query_labels: np.ndarray, database_labels: np.ndarray, num_queries: int
) -> np.ndarray:
    """Rows ``(num_queries,)`` of the queries whose neighbours get better most from the smallest size to the largest.

    Of each class at most one, as long as there are classes left; equal gains by lower row. These are picked to be
    seen, not to be representative.

    Args:
        found: ``{dim: (indices, scores)}`` of `mrl.exact_search`, for all images or for those that
            `mrl.studies.retrieval.thin_rows` takes; what is returned are rows of these queries.
        query_labels: ``(Q,)`` int64, of the same.
        database_labels: ``(N,)`` int64.
        num_queries: 1 to Q.

    Raises:
        UserError: There are not so many queries.
    """
    if not 1 <= num_queries <= len(query_labels):
        raise UserError(f"{num_queries} queries were asked for; allowed are 1 to {len(query_labels)}")
    right = {dim: (database_labels[rows] == query_labels[:, None]).sum(axis=1) for dim, (rows, _) in found.items()}
    order = np.argsort(right[min(right)] - right[max(right)], kind="stable")
    _, firsts = np.unique(query_labels[order], return_index=True)
    best_of_class = np.sort(firsts)
    others = np.setdiff1d(np.arange(len(order)), best_of_class)
    return order[np.concatenate([best_of_class, others])[:num_queries]]


def undecided_images(predictions: np.ndarray, labels: np.ndarray, num_images: int) -> np.ndarray:
    """Rows ``(num_images,)`` of the images whose predicted class changes most often with size and ends up right.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        num_images: 1 to N.

    Raises:
        UserError: There are not so many images.
    """
    if not 1 <= num_images <= len(labels):
        raise UserError(f"{num_images} images were asked for; allowed are 1 to {len(labels)}")
    changes = (np.diff(predictions, axis=0) != 0).sum(axis=0)
    return np.lexsort((-changes, predictions[-1] != labels))[:num_images]
