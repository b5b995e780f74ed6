"""Prefixes in a Qdrant collection, and the funnel as one Qdrant query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mrl.errors import UserError
from mrl.retrieval.rerank import check_stages
from mrl.retrieval.search import Neighbors


def upload(
    client: Any, collection: str, vectors: np.ndarray, dims: Sequence[int], ids: Sequence[str] | None = None
) -> None:
    """Create ``collection`` with a named vector per dim ("8", "64", ...); point i holds ``vectors[i]``.

    Args:
        client: A ``QdrantClient``.
        vectors: ``(N, D)`` of any length; Qdrant normalizes every prefix.
        dims: Prefix dims that `funnel_search` will use. The smallest has an HNSW index in memory. The others only
            re-rank: they stay on disk and have no index, so a search by one of them alone compares all vectors.
        ids: N names, stored as the payload ``id``.
    """
    from qdrant_client import models

    if not dims or not 1 <= min(dims) <= max(dims) <= vectors.shape[1]:
        raise UserError(f"dims are {list(dims)}; allowed: one or more of 1 to the vectors' width {vectors.shape[1]}")
    cosine, no_index = models.Distance.COSINE, models.HnswConfigDiff(m=0)
    params = {
        str(dim): models.VectorParams(
            size=dim, distance=cosine, on_disk=dim > min(dims), hnsw_config=no_index if dim > min(dims) else None
        )
        for dim in dims
    }
    client.create_collection(collection, vectors_config=params)
    client.upload_collection(
        collection,
        vectors=({str(dim): vector[:dim] for dim in dims} for vector in vectors),
        ids=range(len(vectors)),
        payload=None if ids is None else ({"id": name} for name in ids),
    )


def funnel_search(
    client: Any, collection: str, queries: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> Neighbors:
    """Return what `mrl.funnel_search` returns, from one request with nested prefetches per query."""
    from qdrant_client import models

    check_stages(stages, client.count(collection).count, "points of the collection")
    # Each search passes on as many points as the next stage orders.
    limits = [stages[0][1], *(length for _, length in stages[1:]), stages[-1][1]]
    dims = [shortlist_dim, *(dim for dim, _ in stages)]
    requests = []
    for query in queries:
        prefetch = None
        for dim, limit in zip(dims[:-1], limits[:-1], strict=True):
            prefetch = models.Prefetch(prefetch=prefetch, query=query[:dim].tolist(), using=str(dim), limit=limit)
        last = {"query": query[: dims[-1]].tolist(), "using": str(dims[-1]), "limit": limits[-1]}
        requests.append(models.QueryRequest(prefetch=prefetch, **last))
    answers = [answer.points for answer in client.query_batch_points(collection, requests)]
    indices = np.array([[point.id for point in points] for points in answers], dtype=np.int64)
    return indices, np.array([[point.score for point in points] for points in answers], dtype=np.float32)
