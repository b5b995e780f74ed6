"""Retrieval with prefixes in fewer bits: accuracy by bytes per vector. The paper stores float32 only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from mrl.matryoshka import unit_prefix
from mrl.progress import progress
from mrl.results import Row
from mrl.retrieval.metrics import hits, num_relevant, retrieval_metrics
from mrl.retrieval.quantization import CODES, empty_index, search_coded
from mrl.retrieval.rerank import rerank
from mrl.studies.retrieval import thin_indices

STUDY = "quantization"
METRICS = ("top_1", "map@10")
K = 10
SECOND_PASS = {"int8": (50, 200), "sign bits": (50, 200)}  # lengths of the shortlists


def quantization(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    float32: Sequence[Row],
    *,
    max_queries: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows of top-1 (1-NN accuracy) and map@10 of each code at each dim, with ``bytes`` per vector.

    A prefix is normalized, then coded; see `mrl.retrieval.quantization`. In a second pass, the best 50 and the best 200
    by int8 or by sign bits are put in order by the same prefix in float16. ``bytes`` are those of the code that the
    search reads for every vector, as FAISS counts them. Not counted are the 2 x dim bytes of float16, which can stay on
    disk, and what a code keeps once for the whole index. Codes of fewer bits that take as many bytes as int8, which is
    RaBitQ at small dims, are left out.

    Args:
        queries, query_labels, database, database_labels: As for `retrieval`.
        float32: The rows that `retrieval` returned for the same arrays and ``max_queries``, of the methods and dims to
            code. They become rows of this study too.
        device: Where decoded vectors are searched; other codes are searched on the CPU.
    """
    chosen = thin_indices(len(queries), max_queries)
    queries, query_labels = queries[chosen], query_labels[chosen]
    relevant = num_relevant(query_labels, database_labels)
    exact = [replace(row, study=STUDY, cost=None) for row in float32 if row.metric in METRICS]
    k = min(K, len(database))
    ks = [K] if k == K else []  # `retrieval` leaves out map@10 in a smaller database
    dims = sorted({row.dim for row in exact if row.dim is not None})
    rows = [replace(row, code="float32", bytes=4 * row.dim) for row in exact if row.dim is not None]

    def score(dim: int, indices: np.ndarray, code: str, num_bytes: int, length: int | None = None) -> None:
        values = retrieval_metrics(hits(indices[:, :k], query_labels, database_labels), relevant, ks)
        about: Any = {"code": code, "bytes": num_bytes, "shortlist_size": length, "rerank_dim": length and dim}
        rows.extend(replace(row, value=values[row.metric], **about) for row in exact if row.dim == dim)

    what = f"{exact[0].run}: {STUDY} of {exact[-1].method}"
    with progress(total=len(CODES) * sum(dims), desc=what, unit="dim") as bar:
        for dim in dims:
            prefixes = (torch.from_numpy(np.array(part[:, :dim], np.float32)) for part in (queries, database))
            some, units = (unit_prefix(of_part, dim).numpy() for of_part in prefixes)
            for code in CODES:
                bar.update(dim)
                index = empty_index(code, dim)
                size = index.sa_code_size()
                if size >= dim and code not in ("float16", "int8"):
                    continue
                index.train(units)
                index.add(units)
                lengths = [length for length in SECOND_PASS.get(code, ()) if length <= len(units)]
                indices = search_coded(index, some, max([k, *lengths]), device)
                score(dim, indices, code, size)
                for length in lengths:
                    ordered = rerank(some, units.astype(np.float16), indices[:, :length], dim)
                    score(dim, ordered, code, size, length)
    return rows


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points, with columns "bytes" and "percent", that are better than all of as few or fewer bytes."""
    ordered = points.sort_values(["bytes", "percent"], ascending=[True, False])
    return ordered[ordered.percent > ordered.percent.cummax().shift(fill_value=-1.0)]
