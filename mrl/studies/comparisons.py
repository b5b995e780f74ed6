"""Comparisons over seeds: one number a seed, its mean and spread, and what they say of a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mrl.errors import UserError
from mrl.results import Row

MIN_SEEDS = 3
CONFIDENCE = 0.95
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"

BySeed = dict[int, float]
Plan = tuple[int | None, int | None, int | None]  # shortlist_dim, shortlist_size, rerank_dim
NO_PLAN: Plan = (None, None, None)


@dataclass(frozen=True)
class Comparison:
    """One number a seed, and what the claim says of it.

    Attributes:
        what: At which size, against what.
        by_seed: ``{seed: value}``; differences as shares of 1, ratios as they are.
        threshold: The claim is that the mean over seeds is at least this; None is shown without a claim.
        unit: "points" is shown in percentage points, "times" as it is.
    """

    what: str
    by_seed: Mapping[int, float]
    threshold: float | None
    unit: Literal["points", "times"] = "points"

    @property
    def n(self) -> int:
        """Number of seeds that both sides have."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.by_seed.values()) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95% interval of the mean; None below 3 seeds."""
        if self.n < MIN_SEEDS or self.std is None:
            return None
        from scipy.stats import t  # a part of scikit-learn's own requirements

        half = float(t.ppf((1 + CONFIDENCE) / 2, self.n - 1)) * self.std / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def reading(self) -> str | None:
        """Where the interval lies: all at or above the threshold, all below, or across; None where nothing is claimed.

        Below 3 seeds it is "not measured", with the reason.
        """
        if self.threshold is None:
            return None
        if self.interval is None:
            return f"not measured: {self.n} seed{'s' * (self.n > 1)}, a claim needs {MIN_SEEDS}"
        low, high = self.interval
        return HOLDS if low >= self.threshold else FAILS if high < self.threshold else UNDECIDED


@dataclass(frozen=True)
class Effect:
    """One claim of the paper.

    Attributes:
        name: "E1" to "E10".
        claim: What is claimed, thresholds included.
        needs: Which rows it is read from.
        comparisons: Empty where these rows are not there.
    """

    name: str
    claim: str
    needs: str
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> str:
        """One word where all comparisons agree, else each with where it was found; or "not measured" and why."""
        places: dict[str, list[str]] = {}
        for comparison in self.comparisons:
            if comparison.reading is not None:
                places.setdefault(comparison.reading, []).append(comparison.what)
        if not places:
            return f"not measured: no rows of {self.needs}"
        if len(places) == 1:
            return next(iter(places))
        return "; ".join(f"{reading} at {', '.join(where)}" for reading, where in sorted(places.items()))


class SeedTable:
    """Values of rows by seed, of one dataset.

    Raises:
        UserError: Two runs of one method, size and seed: it would be unclear which is meant.
    """

    def __init__(self, rows: Sequence[Row], dataset: str):
        self.rows = [row for row in rows if row.dataset == dataset]
        self.found: dict[tuple[str, str, str, int | None, Plan], BySeed] = {}
        for row in self.rows:
            plan = (row.shortlist_dim, row.shortlist_size, row.rerank_dim)
            by_seed = self.found.setdefault((row.study, row.method, row.metric, row.dim, plan), {})
            if row.seed in by_seed and (row.dim, plan) != (None, NO_PLAN):  # rows of no size are not compared
                raise UserError(
                    f"{row.study}, {row.metric}: two rows of {row.method} at {row.dim or plan} dims with seed "
                    f"{row.seed}, one of them of {row.run}; effects need one model for each method, size and seed"
                )
            by_seed[row.seed] = row.value

    def of(self, study: str, method: str, metric: str, dim: int | None, plan: Plan = NO_PLAN) -> BySeed:
        """``{seed: value}``, empty where there is no such row."""
        return self.found.get((study, method, metric, dim, plan), {})

    def dims(self, study: str, metric: str, *methods: str) -> list[int]:
        """Sizes at which all ``methods`` have rows, ascending."""
        sizes = [{key[3] for key in self.found if key[:3] == (study, method, metric)} for method in methods]
        return sorted(dim for dim in set.intersection(*sizes) if dim is not None)

    def by_size(
        self, study: str, metric: str, ours: str, other: str, threshold: float, prefix: str = ""
    ) -> list[Comparison]:
        """``ours`` minus ``other`` at every size that both have."""
        return [
            Comparison(
                f"{prefix}{dim} dims",
                difference(self.of(study, ours, metric, dim), self.of(study, other, metric, dim)),
                threshold,
            )
            for dim in self.dims(study, metric, ours, other)
        ]


def difference(ours: Mapping[int, float], other: Mapping[int, float]) -> BySeed:
    """``ours - other`` for the seeds that both have."""
    return {seed: ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())}
