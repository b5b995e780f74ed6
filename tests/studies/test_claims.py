import math

import pytest

from mrl.errors import UserError
from mrl.results import Source
from mrl.studies.claims import Comparison, effects, paper_effects

DATASET = "tiny"


def row(study, method, metric, value, seed=0, dataset=DATASET, **rest):
    source = Source(dataset, f"{method}_{rest.get('dim')}_{seed}", seed, 64, 64, flip=False)
    return source.row(study, method, metric, value, 1000, **rest)


def by_size(study, metric, values, dataset=DATASET):
    """Rows from ``{method: {dim: [value of seed 0, of seed 1, ...]}}``."""
    return [
        row(study, method, metric, value, seed, dataset, dim=dim)
        for method, of_method in values.items()
        for dim, of_dim in of_method.items()
        for seed, value in enumerate(of_dim)
    ]


def effect(rows, name):
    return {found.name: found for found in effects(rows, DATASET)}[name]


def test_a_comparison_by_hand():
    # Differences 1, 2 and 3 points: mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027.
    comparison = Comparison("8 dims", {0: 0.01, 1: 0.02, 2: 0.03}, -0.005)
    assert (comparison.n, comparison.mean, comparison.std) == pytest.approx((3, 0.02, 0.01))
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert comparison.interval == pytest.approx((0.02 - half, 0.02 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "threshold", "reading"),
    [
        ([0.010, 0.011, 0.012], -0.005, "holds"),
        ([-0.030, -0.031, -0.032], -0.005, "does not hold"),
        ([-0.02, 0.0, 0.02], -0.005, "undecided"),
        ([0.0, 0.0, 0.0], 0.0, "holds"),
        ([0.5, 0.5], 0.0, "not measured: 2 seeds, a claim needs 3"),
        ([0.5], 0.0, "not measured: 1 seed, a claim needs 3"),
        ([0.5, 0.6, 0.7], None, None),
    ],
)
def test_the_reading_is_where_the_interval_lies(values, threshold, reading):
    assert Comparison("", dict(enumerate(values)), threshold).reading == reading


def test_models_are_compared_seed_by_seed_where_both_have_the_seed():
    rows = by_size("classification", "top_1", {"MRL": {8: [0.5, 0.6, 0.7, 0.9]}, "FF": {8: [0.4, 0.51, 0.62], 16: [1]}})
    [comparison] = effect(rows, "E1").comparisons
    assert comparison.what == "8 dims"
    assert dict(comparison.by_seed) == pytest.approx({0: 0.1, 1: 0.09, 2: 0.08})


def test_a_verdict_names_the_sizes_where_sizes_differ():
    mrl = {8: [0.50, 0.51, 0.52], 16: [0.50, 0.50, 0.50], 32: [0.5, 0.5, 0.5]}
    ff = {8: [0.40, 0.41, 0.42], 16: [0.60, 0.60, 0.60], 32: [0.4, 0.5, 0.6]}
    rows = by_size("classification", "top_1", {"MRL": mrl, "FF": ff})
    assert effect(rows, "E1").verdict == "does not hold at 16 dims; holds at 8 dims; undecided at 32 dims"
    assert effect(by_size("classification", "top_1", {"MRL": mrl}), "E1").verdict == (
        "not measured: no rows of MRL and FF of one size"
    )


def test_mrl_e_may_fall_behind_at_the_smallest_size_only():
    mrl = {8: [0.5, 0.5, 0.5], 16: [0.6, 0.6, 0.6]}
    behind = {8: [0.3, 0.3, 0.3], 16: [0.59, 0.59, 0.59]}
    rows = by_size("classification", "top_1", {"MRL": mrl, "MRL-E": behind})
    assert effect(rows, "E3").verdict == "holds"
    worse = by_size("classification", "top_1", {"MRL": mrl, "MRL-E": behind | {16: [0.5, 0.5, 0.5]}})
    assert effect(worse, "E3").verdict == "does not hold"


def test_a_size_between_is_compared_with_the_line_over_log_size():
    rows = by_size("classification", "top_1", {"MRL": {8: [0], 32: [0]}})
    rows += by_size("retrieval", "top_1", {"MRL": {8: [0.2], 16: [0.5], 32: [0.4]}})
    [comparison] = effect(rows, "E4").comparisons
    assert (comparison.what, comparison.mean) == ("16 dims", pytest.approx(0.5 - 0.3))  # 16 is half-way from 8 to 32


def test_the_cascade_is_measured_in_dims_per_seed_and_claimed_at_a_quarter_of_the_width():
    rows = by_size("classification", "top_1", {"MRL": {8: [0.5] * 3, 256: [0.6] * 3}})
    for seed, expected in enumerate((10.0, 16.0, 20.0)):
        rows += [
            row("cascade", "MRL cascade", "top_1", 0.55, seed, dim=256, expected_dim=expected),
            row("cascade", "FF", "top_1", 0.55, seed, dim=64, expected_dim=64.0),
            row("cascade", "FF", "top_1", 0.70, seed, dim=256, expected_dim=256.0),
        ]
    found = {one.what: one for one in effect(rows, "E5").comparisons}
    assert dict(found["FF-64"].by_seed) == pytest.approx({0: 6.4, 1: 4.0, 2: 3.2})
    assert (found["FF-64"].threshold, found["FF-256"].threshold) == (2.0, None)
    assert set(found["FF-256"].by_seed.values()) == {0.0}  # never reached


def test_a_shortlist_is_compared_with_the_full_search():
    def found(study, shortlist_dim, size, rerank_dim, value):
        sizes = {"shortlist_dim": shortlist_dim, "shortlist_size": size, "rerank_dim": rerank_dim}
        return row(study, "MRL", "map@10", value, **sizes)

    rows = [
        found("adaptive_retrieval", 64, 200, 64, 0.5),
        found("adaptive_retrieval", 16, 200, 64, 0.49),
        found("adaptive_retrieval", 16, 400, 64, 0.9),  # another length than the full search hands on
        found("adaptive_retrieval", 8, 200, 64, 0.9),
        found("adaptive_retrieval", 16, 200, 32, 0.9),
        found("funnel_retrieval", 16, 400, 64, 0.48),
    ]
    found_by_name = {one.what: one.mean for one in effect(rows, "E7").comparisons}
    assert found_by_name == pytest.approx({"shortlist of 200": -0.01, "funnel of 400": -0.02})
    small = [found("adaptive_retrieval", 8, 200, 16, 0.4), found("adaptive_retrieval", 16, 200, 16, 0.5)]
    assert not effect(small, "E7").comparisons, "the full search is no shortlist"


def test_superclasses_are_compared_by_what_they_lose():
    rows = by_size("classification", "top_1", {"MRL": {8: [0.5], 64: [0.6]}})
    rows += by_size("hierarchy", "superclass_top_1", {"MRL": {8: [0.77], 64: [0.8]}})
    [comparison] = effect(rows, "E9").comparisons
    assert (comparison.what, comparison.mean) == ("64 to 8 dims", pytest.approx(0.1 - 0.03))


def test_other_datasets_count_for_transfer_only():
    rows = by_size("few_shot", "top_1_5_shot", {"MRL": {8: [0.6]}, "FF": {8: [0.5]}}, dataset="woof")
    rows += by_size("classification", "top_1", {"MRL": {8: [0.6]}, "FF": {8: [0.5]}}, dataset="woof")
    found = {one.name: one for one in effects(rows, DATASET)}
    assert not any(one.comparisons for name, one in found.items() if name != "E10")
    [comparison] = found["E10"].comparisons
    assert (comparison.what, comparison.mean) == ("woof: 5-shot at 8 dims", pytest.approx(0.1))


def test_two_models_of_one_seed_are_refused_but_rows_of_groups_codes_and_no_size_are_not_compared():
    rows = by_size("classification", "top_1", {"MRL": {8: [0.6]}})
    with pytest.raises(UserError, match="two rows of MRL at 8 dims with seed 0"):
        effects(rows * 2, DATASET)
    effects([row("per_class", "FF", "share_of_classes", 1.0, group="monotone")] * 2, DATASET)  # of FF-8 and FF-16, say
    effects([row("oracle", "FF", "never_correct", 0.1)] * 2, DATASET)
    in_dogs = [row("classification", "MRL", "top_1", 0.1, dim=8, group="dogs")]
    coded = [row("quantization", "MRL", "top_1", 0.1, dim=8, code=code) for code in ("int8", "sign bits")]
    assert effects(rows + in_dogs + coded, DATASET) == effects(rows, DATASET)


def test_the_papers_numbers_give_the_papers_effects():
    found = paper_effects()
    assert found["E1", "8 dims"] == pytest.approx(0.0134)
    assert found["E2", "8 dims"] == pytest.approx(0.0326)
    assert found["E3", "8 dims"] < -0.09
    assert found["E5", "FF-512"] > 10
    assert abs(found["E7", "shortlist of 200"]) < 0.001
