"""Prefixes in a Qdrant collection, and the funnel as one Qdrant query."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mrl.errors import UserError
from mrl.retrieval.rerank import check_stages
from mrl.retrieval.search import Neighbors


def _models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise UserError("this needs Qdrant's client: pip install qdrant-client") from error
    return models


def upload(
    client: Any, collection: str, vectors: np.ndarray, dims: Sequence[int], ids: Sequence[str] | None = None
) -> None:
    """Make ``collection`` and fill it: a named vector per size ("8", "64", ...), point i for row i.

    Args:
        client: A ``QdrantClient``.
        collection: Name of a collection that does not exist yet.
        vectors: ``(N, D)``, raw or of length 1: Qdrant scales each prefix to length 1.
        dims: Prefix sizes to store; those that `funnel_search` will use.
        ids: N names, kept as the payload ``id``.

    Raises:
        UserError: The client is not installed, or a size does not fit the vectors.
    """
    models = _models()
    if not dims or not all(1 <= dim <= vectors.shape[1] for dim in dims):
        raise UserError(f"prefix sizes {list(dims)} must be one or more of 1 to {vectors.shape[1]}")
    params = {str(dim): models.VectorParams(size=dim, distance=models.Distance.COSINE) for dim in dims}
    client.create_collection(collection, vectors_config=params)
    client.upload_collection(
        collection,
        vectors=({str(dim): row[:dim] for dim in dims} for row in vectors),
        ids=range(len(vectors)),
        payload=None if ids is None else ({"id": name} for name in ids),
    )


def funnel_search(
    client: Any, collection: str, queries: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> Neighbors:
    """As `mrl.funnel_search`, by nested prefetches: one request for all queries.

    Args:
        client: A ``QdrantClient``.
        collection: What `upload` has filled.
        queries: ``(Q, D)``, raw or of length 1.
        shortlist_dim: Prefix size of the first search.
        stages: ``(dim, length)`` of each stage; lengths may not grow.

    Raises:
        UserError: The client is not installed, a size is not in the collection, or lengths grow.
    """
    models = _models()
    stored = sorted(map(int, client.get_collection(collection).config.params.vectors))
    for dim in (shortlist_dim, *(dim for dim, _ in stages)):
        if dim not in stored:
            raise UserError(f"the collection {collection!r} holds no prefixes of {dim} dims; it holds {stored}")
    check_stages(stages, client.count(collection).count, "points of the collection")
    requests = [_request(models, query, shortlist_dim, stages) for query in queries]
    answers = [answer.points for answer in client.query_batch_points(collection, requests)]
    indices = np.array([[point.id for point in points] for points in answers], dtype=np.int64)
    return indices, np.array([[point.score for point in points] for points in answers], dtype=np.float32)


def _request(models: Any, query: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]) -> Any:
    # A prefetch hands on as many as the stage after it orders.
    found = models.Prefetch(query=query[:shortlist_dim].tolist(), using=str(shortlist_dim), limit=stages[0][1])
    for (dim, _), (_, length) in itertools.pairwise(stages):
        found = models.Prefetch(prefetch=found, query=query[:dim].tolist(), using=str(dim), limit=length)
    dim, length = stages[-1]
    return models.QueryRequest(prefetch=found, query=query[:dim].tolist(), using=str(dim), limit=length)
