"""A FAISS index that searches a prefix and re-ranks with the full vectors, in one search call."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mrl.errors import UserError


def prefix_index(
    vectors: np.ndarray, shortlist_dim: int, shortlist_factor: float = 20.0, factory: str = "Flat", refine: str = "Flat"
) -> Any:
    """Return a ``faiss.IndexRefine`` of ``vectors`` ``(N, D)``, for queries of the same width.

    It searches the normalized first ``shortlist_dim`` coordinates for ``k * shortlist_factor`` candidates, and orders
    these by cosine at full width. Vectors and queries may have any length; the scores are cosines if the queries have
    length 1. ``faiss.write_index`` saves the index, and FAISS alone reads it.

    If a search finds fewer than ``k``, FAISS fills up with index -1 and score -3.4e38. That happens when the database
    is smaller than ``k``, and with IVF, which looks into one of its lists only unless ``nprobe`` is raised.

    Args:
        vectors: Up to the largest trained dim, e.g. as ``python -m mrl.embed`` writes them.
        shortlist_factor: Candidates per wanted neighbor; ``index.k_factor`` changes it later.
        factory: FAISS's name of the index for the prefixes, e.g. Flat, SQ8, HNSW32, "IVF1024,Flat".
        refine: FAISS's name of the index for the full vectors. Flat keeps 4 bytes per coordinate, SQfp16 2, SQ8 1.

    Raises:
        UserError: FAISS is missing, has no such index for these vectors (e.g. IVF of more lists than vectors), there
            are no vectors, or a vector holds NaN or infinity.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("this index needs FAISS: pip install faiss-cpu") from error
    width = vectors.shape[1]
    if not 1 <= shortlist_dim <= width:
        raise UserError(f"shortlist_dim is {shortlist_dim}; allowed: 1 to the vectors' width {width}")
    if not len(vectors):
        raise UserError("there are no vectors; an index needs one or more")
    lists = re.search(r"IVF(\d+)", factory)
    if lists and int(lists[1]) > len(vectors):
        raise UserError(f"factory is {factory!r}, but there are only {len(vectors)} vectors for its {lists[1]} lists")
    unit = np.array(vectors, dtype=np.float32, order="C")
    if not np.isfinite(unit).all():
        wrong = int(np.flatnonzero(~np.isfinite(unit).all(axis=1))[0])
        raise UserError(f"vector {wrong} holds NaN or infinity, or is too long for float32")
    faiss.normalize_L2(unit)
    uniform: Any = False  # True would take evenly spaced coordinates in place of the first ones
    try:
        base = faiss.IndexPreTransform(faiss.index_factory(shortlist_dim, factory, faiss.METRIC_INNER_PRODUCT))
        base.prepend_transform(faiss.NormalizationTransform(shortlist_dim))
        base.prepend_transform(faiss.RemapDimensionsTransform(width, shortlist_dim, uniform))
        index = faiss.IndexRefine(base, faiss.index_factory(width, refine, faiss.METRIC_INNER_PRODUCT))
        index.k_factor = shortlist_factor
        index.train(unit)
        index.add(unit)
    except RuntimeError as error:
        reason = re.sub(r"^.*\.cpp:\d+: (Error: )?('.*' failed: )?", "", str(error).strip())
        raise UserError(
            f"FAISS refuses factory {factory!r} at {shortlist_dim} dims or refine {refine!r} at {width} for "
            f"{len(unit)} vectors ({reason})"
        ) from error
    return index
