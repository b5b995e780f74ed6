"""The paper's claims E1 to E10, tested on rows of several methods and seeds.

A claim is a list of comparisons. Each has one number per seed (a difference of two models of that seed, or a ratio),
whose mean must be at or above a threshold. "To half a point" means at most half a point below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import t

from mrl.errors import UserError
from mrl.paper import paper_rows
from mrl.results import Row
from mrl.studies.adaptive_classification import CASCADE, dims_saved

MIN_SEEDS = 3
CONFIDENCE = 0.95
# Accuracies within half a point count as equal and within two as close; "far behind" is five.
EQUAL, CLOSE, FAR = 0.005, 0.02, 0.05
SAVING = 2.0
SHORTLIST_DIM = 16
SHOTS = 5
Plan = tuple[Any, Any, Any]  # shortlist_dim, shortlist_size, rerank_dim
BASELINES = {
    "classification": ("FF truncated", "FF low-rank classifier", "FF random coordinates, probe"),
    "retrieval": ("FF truncated", "FF PCA", "FF SVD", "FF random coordinates", "FF random projection"),
}


@dataclass(frozen=True)
class Comparison:
    """One number per seed and the claim about their mean."""

    what: str  # the sizes or methods compared
    by_seed: Mapping[int, float]  # differences are shares of 1
    threshold: float | None  # the mean is claimed to be at least this
    unit: Literal["points", "times"] = "points"  # "points" is shown in percentage points

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95% interval of the mean; None below 3 seeds."""
        if self.n < MIN_SEEDS or self.std is None:
            return None
        half = float(t.ppf((1 + CONFIDENCE) / 2, self.n - 1)) * self.std / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def reading(self) -> str | None:
        """Verdict: the interval is at or above the threshold, below it, or across; None if nothing is claimed."""
        if self.threshold is None:
            return None
        if self.interval is None:
            return f"not measured: {self.n} seed{'s' if self.n > 1 else ''}, a claim needs {MIN_SEEDS}"
        low, high = self.interval
        return "holds" if low >= self.threshold else "does not hold" if high < self.threshold else "undecided"


@dataclass(frozen=True)
class Effect:
    """One claim of the paper: its name "E1" to "E10", its text, the rows that it needs, and its comparisons."""

    name: str
    claim: str
    needs: str
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> str:
        """The reading of all comparisons if they agree, else each reading with its comparisons."""
        places: dict[str, list[str]] = {}
        for comparison in self.comparisons:
            if comparison.reading is not None:
                places.setdefault(comparison.reading, []).append(comparison.what)
        if not places:
            return f"not measured: no rows of {self.needs}"
        if len(places) == 1:
            return next(iter(places))
        return "; ".join(f"{reading} at {', '.join(where)}" for reading, where in sorted(places.items()))


def effects(rows: Sequence[Row], dataset: str) -> list[Effect]:
    """Return E1 to E9 from the rows of ``dataset``, the training data, and E10 from those of the other datasets.

    Models are compared seed by seed, so the initial weights and the order of images cancel out.

    Raises:
        UserError: There are rows of two models of one method, size and seed.
    """
    table = _Table(rows, dataset)
    found = [(name, claim, needs, measure(table)) for name, (claim, needs, measure) in MEASURES.items()]
    others = sorted({row.dataset for row in rows} - {dataset})
    found.append(("E10", *TRANSFER, [one for other in others for one in _transfer(_Table(rows, other), other)]))
    return [
        Effect(name, claim, needs, tuple(one for one in comparisons if one.by_seed))
        for name, claim, needs, comparisons in found
    ]


def paper_effects() -> dict[tuple[str, str], float]:
    """Return ``{(effect, what): value}`` of the paper's own rows (ImageNet-1K, ResNet-50, one run each)."""
    found = effects(paper_rows("imagenet"), "imagenet")
    return {(effect.name, one.what): one.mean for effect in found for one in effect.comparisons}


class _Table:
    """The values by seed of the rows of one dataset that are about all images and vectors in full precision."""

    def __init__(self, rows: Sequence[Row], dataset: str):
        self.rows = [row for row in rows if (row.dataset, row.group, row.code) == (dataset, None, None)]
        self.by_seed: dict[tuple[str, str, str, int | None, Plan], dict[int, float]] = {}
        for row in self.rows:
            plan = (row.shortlist_dim, row.shortlist_size, row.rerank_dim)
            values = self.by_seed.setdefault((row.study, row.method, row.metric, row.dim, plan), {})
            if row.seed in values and (row.dim or row.shortlist_dim):
                raise UserError(
                    f"{row.study}, {row.metric}: two rows of {row.method} at {row.dim or plan} dims with seed "
                    f"{row.seed}, one of them of {row.run}; give one model for each method, size and seed"
                )
            values[row.seed] = row.value

    def of(self, study: str, method: str, metric: str, dim: int | None, plan: Plan = (None, None, None)) -> pd.Series:
        """Return the values by seed; empty if there are none."""
        return pd.Series(self.by_seed.get((study, method, metric, dim, plan), {}), dtype=float)

    def dims(self, study: str, metric: str, *methods: str) -> list[int]:
        """Return the sizes at which all ``methods`` have rows, ascending."""
        sizes = [{key[3] for key in self.by_seed if key[:3] == (study, method, metric)} for method in methods]
        return sorted(dim for dim in set.intersection(*sizes) if dim is not None)

    def by_size(
        self, study: str, metric: str, ours: str, other: str, threshold: float, where: str = ""
    ) -> list[Comparison]:
        """Compare ``ours`` minus ``other`` at every size that both have."""
        return [
            _compare(
                f"{where}{dim} dims", self.of(study, ours, metric, dim) - self.of(study, other, metric, dim), threshold
            )
            for dim in self.dims(study, metric, ours, other)
        ]


def _compare(what: str, values: pd.Series, threshold: float | None) -> Comparison:
    """Compare the seeds that both sides of a difference have."""
    return Comparison(what, values.dropna().sort_index().to_dict(), threshold)


def _neighbors_against_ff(table: _Table) -> list[Comparison]:
    found = table.by_size("retrieval", "top_1", "MRL", "FF", -EQUAL)
    if len(found) > 1:
        gain = pd.Series(found[0].by_seed) - pd.Series(found[-1].by_seed)
        found.append(_compare(f"gain at {found[0].what} minus gain at {found[-1].what}", gain, 0.0))
    return found


def _tied_against_untied(table: _Table) -> list[Comparison]:
    found = table.by_size("classification", "top_1", "MRL-E", "MRL", -CLOSE)
    return [replace(one, threshold=None) if i == 0 else one for i, one in enumerate(found)]


def _sizes_between(table: _Table) -> list[Comparison]:
    """1-NN at untrained sizes minus the straight line, over log size, between the trained neighbors."""
    trained = table.dims("classification", "top_1", "MRL")
    found = []
    for dim in table.dims("retrieval", "top_1", "MRL"):
        below, above = [d for d in trained if d < dim], [d for d in trained if d > dim]
        if dim not in trained and below and above:
            low, here, high = (table.of("retrieval", "MRL", "top_1", d) for d in (below[-1], dim, above[0]))
            share = math.log(dim / below[-1]) / math.log(above[0] / below[-1])
            found.append(_compare(f"{dim} dims", here - (1 - share) * low - share * high, -EQUAL))
    return found


def _cascade_saving(table: _Table) -> list[Comparison]:
    """How many times fewer dims a cascade uses for FF's accuracy; 0 if it never reaches it."""
    method = CASCADE.format("MRL")
    saved: dict[int, dict[int, float]] = {}
    for seed in sorted({row.seed for row in table.rows if row.method == method}):
        for dim, ratio in dims_saved([row for row in table.rows if row.seed == seed], method).items():
            saved.setdefault(dim, {})[seed] = ratio or 0.0
    width = max(table.dims("classification", "top_1", "MRL"), default=0)
    claimed = max((dim for dim in saved if 4 * dim <= width), default=None)
    return [
        Comparison(f"FF-{dim}", by_seed, SAVING if dim == claimed else None, "times")
        for dim, by_seed in sorted(saved.items())
    ]


def _short_search(table: _Table) -> list[Comparison]:
    """mAP@10 of shortlists reranked at the full width, and of funnels, minus the full search's.

    Both begin at 16 dims, or the next size that was searched.
    """
    plans = [(key[0], key[4]) for key in table.by_seed if key[1:3] == ("MRL", "map@10") and key[4][2]]
    width = max((plan[2] for _, plan in plans), default=0)
    first = min((plan[0] for _, plan in plans if SHORTLIST_DIM <= plan[0] < width), default=0)
    found = []
    for full_study, full in plans:
        if full[0] == full[2] == width:
            reference = table.of(full_study, "MRL", "map@10", None, full)
            for study, plan in sorted(plans):
                kind = "funnel" if study == "funnel_retrieval" else "shortlist"
                if plan[0] == first and plan[2] == width and (kind == "funnel" or plan[1] == full[1]):
                    values = table.of(study, "MRL", "map@10", None, plan)
                    found.append(_compare(f"{kind} of {plan[1]}", values - reference, -EQUAL))
    return found


def _baselines_behind(table: _Table) -> list[Comparison]:
    return [
        _compare(
            f"{method} ({'linear' if study == 'classification' else '1-NN'}, {dim} dims)",
            table.of(study, "MRL", "top_1", dim) - table.of(study, method, "top_1", dim),
            FAR,
        )
        for study, methods in BASELINES.items()
        for method in methods
        for dim in table.dims(study, "top_1", "MRL")[:1]
    ]


def _superclasses_fall_less(table: _Table) -> list[Comparison]:
    """What class accuracy loses from the full width to a size, minus what superclass accuracy loses."""
    metrics = ("superclass_top_1", "superclass_top_1_with_reject")
    metric = next((name for name in metrics if table.dims("hierarchy", name, "MRL")), metrics[0])
    *sizes, width = table.dims("hierarchy", metric, "MRL") or [0]
    found = []
    for i, dim in enumerate(sizes):
        (classes, few), (superclasses, few_superclasses) = (
            [table.of(study, "MRL", name, size) for size in (width, dim)]
            for study, name in (("classification", "top_1"), ("hierarchy", metric))
        )
        lost = (classes - few) - (superclasses - few_superclasses)
        found.append(_compare(f"{width} to {dim} dims", lost, None if i else 0.0))
    return found


def _transfer(table: _Table, dataset: str) -> list[Comparison]:
    found = table.by_size("few_shot", f"top_1_{SHOTS}_shot", "MRL", "FF", -EQUAL, f"{dataset}: {SHOTS}-shot at ")
    return found + table.by_size("retrieval", "top_1", "MRL", "FF", -EQUAL, f"{dataset}: 1-NN at ")


# The claim, the rows that it needs, and its comparisons.
MEASURES: dict[str, tuple[str, str, Callable[[_Table], list[Comparison]]]] = {
    "E1": (
        "MRL is at least as accurate as FF trained at each size (linear top-1, to half a point)",
        "MRL and FF of one size",
        lambda table: table.by_size("classification", "top_1", "MRL", "FF", -EQUAL),
    ),
    "E2": (
        "1-NN of MRL is at least as accurate as FF's at each size (to half a point), with a larger gain at small sizes",
        "MRL and FF of one size",
        _neighbors_against_ff,
    ),
    "E3": (
        "MRL-E is within two points of MRL at all sizes but the smallest (linear top-1)",
        "MRL-E and MRL",
        _tied_against_untied,
    ),
    "E4": (
        "sizes between the trained ones lie on the curve (1-NN top-1, to half a point of the line between neighbors)",
        "MRL at sizes between the trained ones",
        _sizes_between,
    ),
    "E5": (
        "the cascade reaches the accuracy of FF at a quarter of the width (or the next size below) with at least two "
        "times fewer expected dims",
        "the cascade of MRL and FF of a quarter of its width or less",
        _cascade_saving,
    ),
    "E6": (
        "mAP@10 of MRL is above FF's at each size",
        "MRL and FF of one size",
        lambda table: table.by_size("retrieval", "map@10", "MRL", "FF", 0.0),
    ),
    "E7": (
        "a shortlist or funnel that begins at 16 dims (or the next size) matches the search at full width (mAP@10, to "
        "half a point)",
        "adaptive retrieval of MRL from 16 dims",
        _short_search,
    ),
    "E8": (
        "truncation, random coordinates, PCA and low-rank heads of FF are at least five points behind MRL at the "
        "smallest size",
        "MRL and baselines of FF at its smallest size",
        _baselines_behind,
    ),
    "E9": (
        "superclass accuracy falls less than class accuracy from the full width to the smallest size",
        "MRL's superclass accuracy",
        _superclasses_fall_less,
    ),
}
TRANSFER = (
    "on other images MRL is at least as accurate as FF (few-shot and 1-NN, to half a point)",
    "MRL and FF of one size on images that they were not trained on",
)
