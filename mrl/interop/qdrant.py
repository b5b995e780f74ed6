"""Prefixes in a Qdrant collection, and the funnel as one Qdrant query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mrl.retrieval.rerank import check_stages
from mrl.retrieval.search import Neighbors, check_ids, check_vectors


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

    check_vectors(vectors, vectors, dims)
    check_ids(ids, vectors)
    cosine = models.Distance.COSINE
    only_reranks: Any = {"on_disk": True, "hnsw_config": models.HnswConfigDiff(m=0)}
    params = {str(dim): models.VectorParams(size=dim, distance=cosine, **only_reranks) for dim in dims}
    params[str(min(dims))] = models.VectorParams(size=min(dims), distance=cosine)
    client.create_collection(collection, vectors_config=params)
    client.upload_collection(
        collection,
        vectors=({str(dim): vector[:dim] for dim in dims} for vector in vectors),
        ids=range(len(vectors)),
        wait=True,
        payload=None if ids is None else ({"id": name} for name in ids),
    )


def funnel_search(
    client: Any, collection: str, queries: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> Neighbors:
    """Return what `mrl.funnel_search` returns, from one request with nested prefetches per query."""
    from qdrant_client import models

    check_stages(stages, client.count(collection).count, "points of the collection")
    # Each search passes on as many points as the next stage orders.
    searches = [(shortlist_dim, stages[0][1])]
    searches += [(dim, length) for (dim, _), (_, length) in zip(stages, [*stages[1:], stages[-1]], strict=True)]
    requests = []
    for query in queries:
        search: Any = None
        for dim, limit in searches:
            search = models.Prefetch(prefetch=search, query=query[:dim].tolist(), using=str(dim), limit=limit)
        requests.append(models.QueryRequest(**dict(search)))
    answers = [answer.points for answer in client.query_batch_points(collection, requests)]
    indices = np.array([[point.id for point in points] for points in answers], dtype=np.int64)
    return indices, np.array([[point.score for point in points] for points in answers], dtype=np.float32)
