"""A FAISS index that searches a prefix and re-ranks with the full vectors, in one search call."""

from __future__ import annotations

from typing import Any

import numpy as np

from mrl.errors import UserError


def prefix_index(vectors: np.ndarray, shortlist_dim: int, shortlist_factor: float = 20.0, factory: str = "Flat") -> Any:
    """Return a ``faiss.IndexRefineFlat`` of ``vectors`` ``(N, D)``, for queries of the same width.

    It searches the normalized first ``shortlist_dim`` coordinates for ``k * shortlist_factor`` candidates, and orders
    these by cosine at full width. Vectors and queries may have any length; the scores are cosines if the queries have
    length 1. ``faiss.write_index`` saves the index, and FAISS alone reads it.

    Args:
        vectors: Up to the largest trained dim, e.g. as ``python -m mrl.embed`` writes them.
        shortlist_factor: Candidates per wanted neighbor; ``index.k_factor`` changes it later.
        factory: FAISS's name of the index for the prefixes, e.g. Flat, HNSW32, "IVF1024,Flat".
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("this index needs FAISS: pip install faiss-cpu") from error
    width = vectors.shape[1]
    if not 1 <= shortlist_dim <= width:
        raise UserError(f"shortlist_dim is {shortlist_dim}; allowed: 1 to the vectors' width {width}")
    uniform: Any = False  # True would take evenly spaced coordinates in place of the first ones
    base = faiss.IndexPreTransform(faiss.index_factory(shortlist_dim, factory, faiss.METRIC_INNER_PRODUCT))
    base.prepend_transform(faiss.NormalizationTransform(shortlist_dim))
    base.prepend_transform(faiss.RemapDimensionsTransform(width, shortlist_dim, uniform))
    index = faiss.IndexRefineFlat(base)
    index.k_factor = shortlist_factor
    unit = np.array(vectors, dtype=np.float32, order="C")
    faiss.normalize_L2(unit)
    index.train(unit)
    index.add(unit)
    return index
