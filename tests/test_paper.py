from collections import Counter

import pytest

from mrl.paper import paper_rows, paper_superclasses


def values(*tables, method="MRL"):
    rows = paper_rows("imagenet", *tables)
    return {row.dim: round(100 * row.value, 4) for row in rows if row.method == method}


def test_numbers_that_the_paper_prints():
    assert list(values("table_1").values()) == [66.63, 73.53, 75.03, 75.82, 76.3, 76.47, 76.65, 76.76, 76.8]
    assert list(values("table_1")) == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    for table, method, dim, value in (
        ("table_1", "FF", 2048, 76.87),
        ("table_2", "MRL-E", 8, 57.45),
        ("figure_5", "MRL", 12, 65.89),
        ("table_8", "MRL", 8, 56.74),
        ("table_25", "MRL", 2048, 90.214),
    ):
        assert values(table, method=method)[dim] == value


def test_no_other_data_set_is_given_the_papers_numbers():
    assert not any(paper_rows(dataset) for dataset in ("digits", "tiny_imagenet", "imagenet_a", "folder", ""))


def test_a_point_of_the_cascade_has_its_expected_dim_and_a_cell_seen_nowhere_is_left_out():
    found = {
        (row.method, row.dim): (round(100 * row.value, 2), row.expected_dim)
        for row in paper_rows("imagenet", "figure_6")
    }
    assert found["MRL cascade", 128] == (76.29, 37.19)
    assert found["FF", 512] == (76.3, 512)
    assert ("MRL cascade", 2048) not in found
    assert 2048 not in values("table_1", method="FF low-rank classifier")


def test_costs_of_adaptive_retrieval_follow_from_its_sizes():
    rows = paper_rows("imagenet", "table_11")
    assert len(rows) == 45
    for row in rows:
        assert row.cost == pytest.approx((row.shortlist_dim * 1_281_167 + 200 * row.rerank_dim) / 1e6, abs=0.02)


def test_every_row_is_marked_as_the_papers_and_no_point_stands_twice():
    rows = paper_rows("imagenet")
    assert {(row.run, row.dataset) for row in rows} == {("paper", "imagenet")}
    points = Counter((row.study, row.metric, row.method, row.dim, row.shortlist_dim, row.rerank_dim) for row in rows)
    assert set(points.values()) == {1}


def test_the_thirty_superclasses_have_the_sizes_that_the_papers_accuracies_are_shares_of():
    sizes = Counter(paper_superclasses().values())
    assert (len(sizes), sum(sizes.values())) == (30, 467)
    assert (sizes["insect"], sizes["terrier"], sizes["tool"], sizes["mechanism"]) == (27, 26, 12, 10)
    # Its notebook prints these of MRL-8: shares of 50 images a class.
    for name, share in {"insect": 0.95111111, "protective covering": 0.645, "vessel": 0.64173913, "tool": 0.45}.items():
        right = share * 50 * sizes[name]
        assert right == pytest.approx(round(right), abs=1e-4)
