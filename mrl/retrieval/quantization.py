"""Prefixes in fewer bytes: FAISS's codes, and the search among coded vectors."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import torch

from mrl.retrieval.search import exact_search

# FAISS's name of each code. Codes of a few bits need a random rotation, RR or the r of LSH, which stays inside the
# prefix: a rotation of the whole vector would destroy the nesting. Without it the sign bits of pooled activations,
# which are never negative, are all equal. The t of LSH compares with the median; fs is the faster of two layouts.
CODES = {
    "float16": "SQfp16",
    "int8": "SQ8",
    "4 bits": "SQ4",
    "RaBitQ, 4 bits": "RR{dim},RaBitQfs4",
    "RaBitQ, 1 bit": "RR{dim},RaBitQfs",
    "sign bits": "LSHrt",
}


@cache
def faiss_installed() -> bool:
    """Return whether FAISS is installed and new enough; if it is not, say once on stderr what is left out."""
    try:
        import faiss

        if [int(part) for part in faiss.__version__.split(".")[:2]] >= [1, 15]:
            return True
    except ImportError:
        pass
    print("the quantization study is left out: it needs FAISS 1.15 or newer (pip install faiss-cpu)", file=sys.stderr)
    return False


def empty_index(code: str, dim: int) -> Any:
    """Return an untrained FAISS index that stores vectors of ``dim`` in one of `CODES`."""
    import faiss

    # FAISS compares sign bits by Hamming distance, which its factory calls L2.
    metric = faiss.METRIC_L2 if code == "sign bits" else faiss.METRIC_INNER_PRODUCT
    return faiss.index_factory(dim, CODES[code].format(dim=dim), metric)


def search_coded(index: Any, queries: np.ndarray, k: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Return what ``index.search`` finds for unit ``queries`` ``(Q, dim)``: indices ``(Q, k)`` int64, best first.

    Sign bits are compared with those of the queries; for the other codes the queries are not rounded. Scalar codes are
    decoded and searched on ``device`` by `exact_search`, several times faster than by FAISS's loop over the codes.
    """
    import faiss

    if isinstance(index, faiss.IndexScalarQuantizer):
        decoded = index.reconstruct_n(0, index.ntotal)
        return exact_search(queries, decoded, k, [index.d], metric="inner product", device=device)[index.d][0]
    return index.search(queries, k)[1]
