"""Comparisons over seeds: one number a seed, its mean and spread, and what they say of a claim.

Which of the paper's effects hold: rows of several methods and seeds in, differences with their spread out.

Every effect is a list of comparisons, and every comparison one number a seed (a difference of two models of
that seed, or a ratio) that the claim wants at or above a threshold. `Comparison.reading` turns it into words. "To half
a point" means: not more than that below.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mrl.errors import UserError
from mrl.paper import paper_rows
from mrl.results import Row
from mrl.studies.adaptive_classification import GREEDY, dims_saved

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


# Accuracies within half a percentage point count as equal, within two as close; "far behind" is five.
EQUAL, CLOSE, FAR = 0.005, 0.02, 0.05
MANY_TIMES = 2.0
SHORTLIST_DIM = 16
SHOTS = 5
# Baselines by study: what small sizes of the full-width fixed-feature model are worth.
BASELINES = {
    "classification": ("FF truncated", "FF low-rank classifier", "FF random coordinates, probe"),
    "retrieval": ("FF truncated", "FF PCA", "FF SVD", "FF random coordinates", "FF random projection"),
}


def effects(rows: Sequence[Row], dataset: str) -> list[Effect]:
    """E1 to E10 from the rows of ``dataset``, on which the models were trained; E10 from the other datasets' rows.

    Comparisons are between models of one seed, so what is the same for both (initial weights, order of images) does
    not blur them.

    Raises:
        UserError: As `SeedTable`.
    """
    table = SeedTable(rows, dataset)
    further = {other: SeedTable(rows, other) for other in sorted({row.dataset for row in rows} - {dataset})}
    found = [(name, claim, needs, measure(table)) for name, (claim, needs, measure) in MEASURES.items()]
    found.append(("E10", *TRANSFER, transfer(further)))
    return [
        Effect(name, claim, needs, tuple(one for one in comparisons if one.by_seed))
        for name, claim, needs, comparisons in found
    ]


def paper_effects() -> dict[tuple[str, str], float]:
    """``{(effect, what): value}`` of the paper's own rows (ImageNet-1K, ResNet-50, one run each)."""
    found = effects(paper_rows("imagenet"), "imagenet")
    return {(effect.name, one.what): one.mean for effect in found for one in effect.comparisons}


def accuracy_against_ff(table: SeedTable) -> list[Comparison]:
    """E1."""
    return table.by_size("classification", "top_1", "MRL", "FF", -EQUAL)


def neighbors_against_ff(table: SeedTable) -> list[Comparison]:
    """E2: the same for 1-NN; and that the gain is larger at the smallest size than at the largest."""
    found = table.by_size("retrieval", "top_1", "MRL", "FF", -EQUAL)
    if len(found) > 1:
        larger = difference(found[0].by_seed, found[-1].by_seed)
        found.append(Comparison(f"gain at {found[0].what} minus gain at {found[-1].what}", larger, 0.0))
    return found


def tied_against_untied(table: SeedTable) -> list[Comparison]:
    """E3; nothing is claimed of the smallest size."""
    found = table.by_size("classification", "top_1", "MRL-E", "MRL", -CLOSE)
    return [replace(one, threshold=None) if i == 0 else one for i, one in enumerate(found)]


def sizes_between(table: SeedTable) -> list[Comparison]:
    """E4: 1-NN at sizes that were not trained, minus the straight line (over log size) between their neighbors."""
    sizes = table.dims("retrieval", "top_1", "MRL")
    trained = table.dims("classification", "top_1", "MRL")
    found = []
    for dim in sizes:
        below, above = [d for d in trained if d < dim], [d for d in trained if d > dim]
        if dim in trained or not below or not above:
            continue
        low, here, high = (table.of("retrieval", "MRL", "top_1", d) for d in (below[-1], dim, above[0]))
        share = math.log(dim / below[-1]) / math.log(above[0] / below[-1])
        line = {seed: (1 - share) * low[seed] + share * high[seed] for seed in low.keys() & high.keys()}
        found.append(Comparison(f"{dim} dims", difference(here, line), -EQUAL))
    return found


def cascade_saving(table: SeedTable) -> list[Comparison]:
    """E5: how many times fewer dims a cascade uses for the accuracy of FF; 0 where it never reaches it.

    The claim is made of one FF size, a quarter of the full width or the next smaller one there is.
    """
    saved: dict[int, BySeed] = {}
    for seed in sorted({row.seed for row in table.rows}):
        of_seed = [row for row in table.rows if row.seed == seed]
        if any(row.method == GREEDY.format("MRL") for row in of_seed):
            for dim, ratio in dims_saved(of_seed, GREEDY.format("MRL")).items():
                saved.setdefault(dim, {})[seed] = ratio or 0.0
    width = max(table.dims("classification", "top_1", "MRL"), default=0)
    claimed = max((dim for dim in saved if 4 * dim <= width), default=None)
    return [
        Comparison(f"FF-{dim}", by_seed, MANY_TIMES if dim == claimed else None, "times")
        for dim, by_seed in sorted(saved.items())
    ]


def precision_against_ff(table: SeedTable) -> list[Comparison]:
    """E6."""
    return table.by_size("retrieval", "map@10", "MRL", "FF", 0.0)


def short_search(table: SeedTable) -> list[Comparison]:
    """E7: mAP@10 of a search at 16 dims reranked at the full width, and of funnels from 16, minus the full search's."""
    plans = {(key[0], key[4]) for key in table.found if key[1:3] == ("MRL", "map@10") and key[4][2] is not None}
    width = max((rerank or 0 for _, (_, _, rerank) in plans), default=0)
    full = max((plan for _, plan in plans if plan[0] == width), default=None, key=lambda plan: plan[1] or 0)
    if full is None:
        return []
    reference = table.of("adaptive_retrieval", "MRL", "map@10", None, full)
    found = []
    for study, plan in sorted(plans, key=str):
        if plan[0] == SHORTLIST_DIM and plan[2] == width and (study == "funnel_retrieval" or plan[1] == full[1]):
            name = "funnel" if study == "funnel_retrieval" else "shortlist"
            ours = table.of(study, "MRL", "map@10", None, plan)
            found.append(Comparison(f"{name} of {plan[1]}", difference(ours, reference), -EQUAL))
    return found


def baselines_behind(table: SeedTable) -> list[Comparison]:
    """E8: at MRL's smallest size."""
    found = []
    for study, methods in BASELINES.items():
        kind = "linear" if study == "classification" else "1-NN"
        smallest = table.dims(study, "top_1", "MRL")[:1]
        for method in methods:
            for dim in smallest:
                sides = (table.of(study, name, "top_1", dim) for name in ("MRL", method))
                found.append(Comparison(f"{method} ({kind}, {dim} dims)", difference(*sides), FAR))
    return found


def superclasses_fall_less(table: SeedTable) -> list[Comparison]:
    """E9: what class accuracy loses from the full width to a size, minus what superclass accuracy loses.

    The claim is made of the smallest size.
    """
    metrics = ("superclass_top_1", "superclass_top_1_with_reject")
    metric = next((name for name in metrics if table.dims("hierarchy", name, "MRL")), metrics[0])
    *sizes, width = table.dims("hierarchy", metric, "MRL") or [0]
    found = []
    for dim in sizes:
        losses = [
            difference(table.of(study, "MRL", name, width), table.of(study, "MRL", name, dim))
            for study, name in (("classification", "top_1"), ("hierarchy", metric))
        ]
        found.append(Comparison(f"{width} to {dim} dims", difference(*losses), 0.0 if dim == sizes[0] else None))
    return found


def transfer(further: Mapping[str, SeedTable]) -> list[Comparison]:
    """E10."""
    found = []
    for name, table in further.items():
        found += table.by_size("few_shot", f"top_1_{SHOTS}_shot", "MRL", "FF", -EQUAL, f"{name}: {SHOTS}-shot at ")
        found += table.by_size("retrieval", "top_1", "MRL", "FF", -EQUAL, f"{name}: 1-NN at ")
    return found


# Claim, the rows that it needs, and how it is measured.
MEASURES: dict[str, tuple[str, str, Callable[[SeedTable], list[Comparison]]]] = {
    "E1": (
        "MRL is at least as accurate as FF trained at each size (linear top-1, to half a point)",
        "MRL and FF of one size",
        accuracy_against_ff,
    ),
    "E2": (
        "1-NN of MRL is at least as accurate as FF's at each size (to half a point), with a larger gain at small sizes",
        "MRL and FF of one size",
        neighbors_against_ff,
    ),
    "E3": (
        "MRL-E is within two points of MRL at all sizes but the smallest (linear top-1)",
        "MRL-E and MRL",
        tied_against_untied,
    ),
    "E4": (
        "sizes between the trained ones lie on the curve (1-NN top-1, to half a point of the line between neighbors)",
        "MRL at sizes between the trained ones",
        sizes_between,
    ),
    "E5": (
        "the cascade reaches the accuracy of FF at a quarter of the width (or the next size below) with at least two "
        "times fewer expected dims",
        "the cascade of MRL and FF of a quarter of its width or less",
        cascade_saving,
    ),
    "E6": ("mAP@10 of MRL is above FF's at each size", "MRL and FF of one size", precision_against_ff),
    "E7": (
        "a shortlist or funnel that begins at 16 dims matches the search at full width (mAP@10, to half a point)",
        "adaptive retrieval of MRL from 16 dims",
        short_search,
    ),
    "E8": (
        "truncation, random coordinates, PCA and low-rank heads of FF are at least five points behind MRL at the "
        "smallest size",
        "MRL and baselines of FF at its smallest size",
        baselines_behind,
    ),
    "E9": (
        "superclass accuracy falls less than class accuracy from the full width to the smallest size",
        "MRL's superclass accuracy",
        superclasses_fall_less,
    ),
}
TRANSFER = (
    "on other images MRL is at least as accurate as FF (few-shot and 1-NN, to half a point)",
    "MRL and FF of one size on images that they were not trained on",
)
