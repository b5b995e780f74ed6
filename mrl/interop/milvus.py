"""Prefixes in a Milvus collection, and the funnel as Milvus searches.

Milvus cannot search the prefix of a stored vector, so every dim is a column of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mrl.retrieval.rerank import check_stages
from mrl.retrieval.search import Neighbors, check_ids, check_vectors

INSERT_ROWS = 1000  # a request to a server may hold 64 MB


def upload(
    client: Any, collection: str, vectors: np.ndarray, dims: Sequence[int], ids: Sequence[str] | None = None
) -> None:
    """Create ``collection`` with a vector column per dim (dim_8, dim_64, ...); primary key i holds ``vectors[i]``.

    Args:
        client: A ``MilvusClient``; one of a file name is Milvus Lite.
        vectors: ``(N, D)`` of any length; Milvus compares by cosine.
        dims: Prefix dims that `funnel_search` will use.
        ids: N names, stored in the column ``name``.
    """
    from pymilvus import DataType

    check_vectors(vectors, vectors, dims)
    check_ids(ids, vectors)
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("index", DataType.INT64, is_primary=True)
    schema.add_field("name", DataType.VARCHAR, max_length=4096)
    search_indexes = client.prepare_index_params()
    for dim in dims:
        schema.add_field(f"dim_{dim}", DataType.FLOAT_VECTOR, dim=dim)
        search_indexes.add_index(f"dim_{dim}", index_type="FLAT", metric_type="COSINE")
    client.create_collection(collection, schema=schema, index_params=search_indexes)
    entries = [
        {"index": i, "name": "" if ids is None else ids[i]} | {f"dim_{dim}": vector[:dim] for dim in dims}
        for i, vector in enumerate(vectors)
    ]
    for start in range(0, len(entries), INSERT_ROWS):
        client.insert(collection, entries[start : start + INSERT_ROWS])


def funnel_search(
    client: Any, collection: str, queries: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> Neighbors:
    """Return what `mrl.funnel_search` returns, by one search of all queries, then one per query and stage."""
    consistent = {"consistency_level": "Strong"}  # sees every vector that was inserted before

    def search(some: np.ndarray, dim: int, limit: int, filter: str = "") -> Any:
        prefixes = np.asarray(some[:, :dim], dtype=np.float32).tolist()
        return client.search(collection, prefixes, filter, limit, anns_field=f"dim_{dim}", **consistent)

    count = client.query(collection, output_fields=["count(*)"], **consistent)[0]["count(*)"]
    check_stages(stages, count, "vectors of the collection")
    answers = []
    for query, hits in zip(queries, search(queries, shortlist_dim, stages[0][1]), strict=True):
        for dim, length in stages:
            [hits] = search(query[None], dim, length, f"index in {[hit['index'] for hit in hits[:length]]}")
        answers.append(hits)
    indices = np.array([[hit["index"] for hit in hits] for hits in answers], dtype=np.int64)
    return indices, np.array([[hit["distance"] for hit in hits] for hits in answers], dtype=np.float32)
