"""Prefixes in a Milvus collection, and the funnel as Milvus searches.

Milvus cannot search the prefix of a stored vector: every size is a column of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mrl.errors import UserError
from mrl.retrieval.rerank import check_stages
from mrl.retrieval.search import Neighbors

INSERT_ROWS = 1000  # a request to a server may hold 64 MB


def _column(dim: int) -> str:
    return f"dim_{dim}"


def upload(
    client: Any, collection: str, vectors: np.ndarray, dims: Sequence[int], ids: Sequence[str] | None = None
) -> None:
    """Make ``collection`` and fill it: a vector column per size (dim_8, dim_64, ...), row i with primary key i.

    Args:
        client: A ``MilvusClient``; one of a file name is Milvus Lite.
        collection: Name of a collection that does not exist yet.
        vectors: ``(N, D)``, raw or of length 1: Milvus compares by cosine.
        dims: Prefix sizes to store; those that `funnel_search` will use.
        ids: N names, kept in the column ``name``.

    Raises:
        UserError: The client is not installed, or a size does not fit the vectors.
    """
    try:
        from pymilvus import DataType
    except ImportError as error:
        raise UserError("this needs Milvus's client: pip install pymilvus milvus-lite") from error
    if not dims or not all(1 <= dim <= vectors.shape[1] for dim in dims):
        raise UserError(f"prefix sizes {list(dims)} must be one or more of 1 to {vectors.shape[1]}")
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("name", DataType.VARCHAR, max_length=4096)
    indexes = client.prepare_index_params()
    for dim in dims:
        schema.add_field(_column(dim), DataType.FLOAT_VECTOR, dim=dim)
        indexes.add_index(_column(dim), index_type="FLAT", metric_type="COSINE")
    client.create_collection(collection, schema=schema, index_params=indexes)
    for first in range(0, len(vectors), INSERT_ROWS):
        rows = range(first, min(first + INSERT_ROWS, len(vectors)))
        prefixes = [{_column(dim): vectors[row, :dim] for dim in dims} for row in rows]
        names = ["" if ids is None else ids[row] for row in rows]
        client.insert(
            collection, [{"row": row, "name": n, **p} for row, n, p in zip(rows, names, prefixes, strict=True)]
        )


def funnel_search(
    client: Any, collection: str, queries: np.ndarray, shortlist_dim: int, stages: Sequence[tuple[int, int]]
) -> Neighbors:
    """As `mrl.funnel_search`: a search of all queries, then a filtered search per query and stage.

    Args:
        client: A ``MilvusClient``.
        collection: What `upload` has filled.
        queries: ``(Q, D)``, raw or of length 1.
        shortlist_dim: Prefix size of the first search.
        stages: ``(dim, length)`` of each stage; lengths may not grow.

    Raises:
        UserError: A size is not in the collection, or lengths grow.
    """
    columns = [field["name"] for field in client.describe_collection(collection)["fields"]]
    for dim in (shortlist_dim, *(dim for dim, _ in stages)):
        if _column(dim) not in columns:
            raise UserError(f"the collection {collection!r} has no column {_column(dim)}; it has {columns}")
    # Everything that was inserted before must be seen, also by a search that comes at once.
    count = client.query(collection, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
    check_stages(stages, count, "rows of the collection")
    found = _search(client, collection, queries, shortlist_dim, stages[0][1])
    answers = []
    for query, hits in zip(queries, found, strict=True):
        for dim, length in stages:
            rows = [hit["row"] for hit in hits[:length]]
            hits = _search(client, collection, query[None], dim, length, f"row in {rows}")[0]
        answers.append(hits)
    indices = np.array([[hit["row"] for hit in hits] for hits in answers], dtype=np.int64)
    return indices, np.array([[hit["distance"] for hit in hits] for hits in answers], dtype=np.float32)


def _search(client: Any, collection: str, queries: np.ndarray, dim: int, limit: int, filter: str = "") -> Any:
    prefixes = np.asarray(queries[:, :dim], dtype=np.float32).tolist()
    return client.search(
        collection, data=prefixes, anns_field=_column(dim), limit=limit, filter=filter, consistency_level="Strong"
    )
