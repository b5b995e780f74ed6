"""What a search costs in arithmetic (paper, tables 8 and 10 to 14, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence


def mflops_per_query(num_rows: int, shortlist_dim: int, stages: Sequence[tuple[int, int]] = ()) -> float:
    """Million multiply-adds per query: ``(shortlist_dim * N + sum of length * dim over the stages) / 1e6``.

    The paper counts a multiply and an add as one operation, and counts the re-ranking also where its
    size is that of the shortlist; this matches its tables 11 and 12 in every row. It is arithmetic,
    not time: a search at 8 dims takes far more than 1/256 of the time of one at 2048.

    Args:
        num_rows: Vectors in the database, N.
        shortlist_dim: Prefix size of the first, exhaustive search.
        stages: ``(dim, length)`` of each re-ranking; none for a plain search.
    """
    return (shortlist_dim * num_rows + sum(dim * length for dim, length in stages)) / 1e6
