"""What a search costs in multiply-adds (paper, section 4.3.1)."""

from __future__ import annotations

from collections.abc import Sequence


def mflops_per_query(num_rows: int, shortlist_dim: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Million multiply-adds per query: a search of ``num_rows``, then each stage ``(dim, length)`` of reranking."""
    return (num_rows * shortlist_dim + sum(dim * length for dim, length in stages)) / 1e6
