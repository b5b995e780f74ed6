"""A FAISS index that searches a prefix and re-ranks with the full vectors, in one search call."""

from __future__ import annotations

from typing import Any

import numpy as np

from mrl.errors import UserError


def prefix_index(vectors: np.ndarray, shortlist_dim: int, shortlist_factor: float = 20.0, factory: str = "Flat") -> Any:
    """A ``faiss.IndexRefineFlat`` of the rows of ``vectors``, for queries of the same width.

    Inside it: the first ``shortlist_dim`` coordinates are scaled to length 1 and searched by an index
    of any kind; the best ``k * shortlist_factor`` are ordered by cosine at full width. Queries may be raw
    at any length: the order does not depend on it. The scores are cosines for queries of length 1.
    ``faiss.write_index`` saves it, and plain FAISS reads it.

    Args:
        vectors: ``(N, D)``, raw or of length 1.
        shortlist_dim: Prefix size of the first search.
        shortlist_factor: How many times k the first search hands on; ``index.k_factor`` changes it later.
        factory: FAISS's name of the index for the prefixes, e.g. Flat, HNSW32, "IVF1024,Flat"; trained on
            ``vectors`` if it has to be.

    Raises:
        UserError: faiss is not installed, a size does not fit, or the factory string is not one.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("this index needs FAISS: pip install faiss-cpu") from error
    width = vectors.shape[1]
    if not 1 <= shortlist_dim <= width:
        raise UserError(f"shortlist_dim is {shortlist_dim}; vectors of width {width} allow 1 to {width}")
    if shortlist_factor < 1:
        raise UserError(f"shortlist_factor is {shortlist_factor}; allowed: 1 or more")
    try:
        of_prefixes = faiss.index_factory(shortlist_dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"factory {factory!r} is not an index that FAISS knows: {error}") from error
    uniform: Any = False  # evenly spaced coordinates; else the first ones
    base = faiss.IndexPreTransform(of_prefixes)
    base.prepend_transform(faiss.NormalizationTransform(shortlist_dim))
    base.prepend_transform(faiss.RemapDimensionsTransform(width, shortlist_dim, uniform))
    index = faiss.IndexRefineFlat(base)
    index.k_factor = shortlist_factor
    unit = np.array(vectors, dtype=np.float32, order="C")
    faiss.normalize_L2(unit)
    index.train(unit)
    index.add(unit)
    return index
