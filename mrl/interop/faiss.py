"""A FAISS index that searches a prefix and re-ranks with the full vectors, in one search call."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from mrl.errors import UserError
from mrl.retrieval.search import check_vectors, inverse_norms


def prefix_index(
    vectors: np.ndarray, shortlist_dim: int, shortlist_factor: float = 20.0, factory: str = "Flat", refine: str = "Flat"
) -> Any:
    """Return a ``faiss.IndexRefine`` of ``vectors`` ``(N, D)``, for queries of the same width.

    It searches the normalized first ``shortlist_dim`` coordinates for ``k * shortlist_factor`` candidates, and orders
    these by cosine at full width. Vectors and queries may have any length; the scores are cosines if the queries have
    length 1. ``faiss.write_index`` saves the index, and FAISS alone reads it.

    Where a search finds fewer than ``k``, FAISS fills up with index -1 and score -3.4e38. That happens when the
    database is smaller than ``k``, and with IVF, which looks into one of its lists only unless ``nprobe`` is raised.

    Args:
        vectors: Up to the largest trained dim, e.g. as ``python -m mrl.embed`` writes them.
        shortlist_factor: Candidates per wanted neighbor; ``index.k_factor`` changes it later.
        factory: FAISS's name of the index for the prefixes, e.g. Flat, SQ8, HNSW32, "IVF1024,Flat".
        refine: FAISS's name of the index for the full vectors. Flat keeps 4 bytes per coordinate, SQfp16 2, SQ8 1.

    Raises:
        UserError: FAISS is missing or has no such index for these vectors, or a vector holds NaN or infinity.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("this index needs FAISS: pip install faiss-cpu") from error
    check_vectors(vectors, vectors, [shortlist_dim])
    if shortlist_factor < 1:
        raise UserError(f"shortlist_factor is {shortlist_factor}; allowed: 1 or more")
    width = vectors.shape[1]
    unit = np.array(vectors, dtype=np.float32, order="C")
    inverse_norms(torch.from_numpy(unit), [width], "database")  # raises if one is not finite
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
        what = f"factory {factory!r} at {shortlist_dim} dims or refine {refine!r} at {width}"
        raise UserError(f"FAISS refuses {what} for {len(unit)} vectors ({reason})") from error
    return index
