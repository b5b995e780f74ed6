import dataclasses
import statistics

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.figures import accuracy_by_dim, adaptive_retrieval, baselines_by_dim, interpolation, retrieval_by_dim, save
from mrl.figures.style import NothingToDraw
from mrl.results import Source
from mrl.studies.adaptive_retrieval import ablation, funnels, pairs

DIMS = (8, 16, 32, 64)
BETWEEN = (12, 24, 48)


def rows_of(method, run, dims, seed=0, lower=0.0, between=()):
    """Classification rows at ``dims``, retrieval rows also at ``between``; better the larger the size is."""
    source = Source("digits", run, seed, 32, 28, False)
    rows = [source.row("classification", method, "top_1", 0.9 - 1 / dim - lower, 360, dim=dim) for dim in dims]
    for i, metric in enumerate(("top_1", "map@10")):
        values = {dim: 0.9 - 1 / dim - 0.1 * i - lower for dim in (*dims, *between)}
        rows += [source.row("retrieval", method, metric, value, 360, dim=dim) for dim, value in values.items()]
    return rows


def adaptive_rows(run="mrl", seed=0, method="MRL", timed=True):
    source = Source("digits", run, seed, 32, 28, False)
    plans = [("adaptive_retrieval", *plan) for plan in pairs(DIMS, 5000) + ablation(DIMS, 5000)]
    plans += [("funnel_retrieval", *plan) for plan in funnels(DIMS, 5000)]
    rows = []
    for study, dim, stages in plans:
        where = {"shortlist_dim": dim, "shortlist_size": stages[0][1], "rerank_dim": stages[-1][0]}
        cost = (5000 * dim + sum(size * length for size, length in stages)) / 1e6
        for i, metric in enumerate(("top_1", "map@10")):
            value = 0.9 - 1 / stages[-1][0] - 0.5 / dim - 0.1 * i - 0.01 * seed
            time = 0.1 + cost if timed else None
            rows.append(source.row(study, method, metric, value, 360, cost=cost, ms_per_query=time, **where))
    return rows


ROWS = [
    *rows_of("MRL", "mrl", DIMS, between=BETWEEN),
    *rows_of("MRL-E", "mrl_e", DIMS, lower=0.02, between=BETWEEN),
    *rows_of("FF", "ff8", (8,), lower=0.03),
    *rows_of("FF", "ff", (64,), lower=0.01),
    *rows_of("FF truncated", "ff", DIMS, lower=0.3),
    *rows_of("FF PCA", "ff", DIMS[:-1], lower=0.1),
    *rows_of("FF random coordinates", "ff", DIMS[:-1], lower=0.2),
]


def drawn(axes):
    """{label: points} of the lines with a label."""
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


def points(rows, metric, method, dims):
    return [
        (row.dim, pytest.approx(100 * row.value))
        for row in rows
        if (row.study, row.metric, row.method) == ("retrieval", metric, method) and row.dim in dims
    ]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figure_7_is_the_rows_at_trained_sizes_without_baselines():
    figure = retrieval_by_dim(ROWS)
    [axes] = figure.axes
    assert legend(figure) == ["MRL", "MRL-E", "FF (one model per size)", "FF, plain truncation"]
    assert drawn(axes)["MRL"] == points(ROWS, "map@10", "MRL", DIMS)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("mAP@10 (%)", "embedding size (dims)")


def test_sizes_between_the_trained_ones_stay_out_of_the_other_figures():
    for figure in (accuracy_by_dim(ROWS), baselines_by_dim(ROWS), retrieval_by_dim(ROWS, "top_1")):
        for axes in figure.axes:
            assert {dim for line in drawn(axes).values() for dim, _ in line} == set(DIMS)


def test_figure_5_fills_trained_sizes_and_leaves_those_between_hollow():
    figure = interpolation(ROWS)
    [axes] = figure.axes
    [line] = [line for line in axes.lines if line.get_label() == "MRL"]
    [hollow] = [
        other for other in axes.lines if other.get_label() == "_between" and other.get_color() == line.get_color()
    ]
    assert line.get_markerfacecolor() == line.get_color()
    assert hollow.get_markerfacecolor() == "white" and hollow.get_linestyle() == "None"
    assert drawn(axes)["MRL"] == points(ROWS, "top_1", "MRL", DIMS)
    assert list(zip(*map(list, hollow.get_data()), strict=True)) == points(ROWS, "top_1", "MRL", BETWEEN)
    assert legend(figure) == [
        "MRL",
        "MRL-E",
        "FF (one model per size)",
        "trained size",
        "size between, never trained",
    ]


def test_figure_5_asks_for_the_rows_that_tell_the_trained_sizes():
    with pytest.raises(UserError, match="mrl has no classification rows"):
        interpolation([row for row in ROWS if row.study != "classification"])


def test_figure_5_is_not_drawn_where_no_size_lies_between():
    for some in (rows_of("FF", "ff", (64,)), rows_of("MRL", "mrl", DIMS)):
        with pytest.raises(NothingToDraw, match="top_1 at sizes that were never trained"):
            interpolation(some)


def test_the_papers_sizes_between_are_drawn_in_figure_5_alone():
    rows = [dataclasses.replace(row, dataset="imagenet") for row in ROWS]
    _, nearest = accuracy_by_dim(rows).axes
    _, of_baselines, _ = baselines_by_dim(rows).axes
    for axes in (nearest, of_baselines):
        dims = [dim for dim, _ in drawn(axes)["MRL (paper)"]]
        assert dims == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert 12 in dict(drawn(interpolation(rows).axes[0])["MRL (paper)"])


def test_baselines_stand_beside_mrl_in_three_panels_each_in_its_own_style():
    figure = baselines_by_dim(ROWS)
    assert [axes.get_title() for axes in figure.axes] == ["linear classification", "1-nearest neighbor", "retrieval"]
    assert legend(figure)[-2:] == ["FF PCA", "FF random coordinates"]
    for axes in figure.axes:
        styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(styles) == len(axes.lines) == 6
        assert len({line.get_marker() for line in axes.lines}) == 6, "told apart without color"


def test_figure_8_has_every_row_once_against_multiply_adds_and_against_time():
    rows = adaptive_rows()
    figure = adaptive_retrieval(rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["mAP@10 (%)", "", "top-1 accuracy (%)", ""]
    for axes, metric, column in zip(
        figure.axes, ["map@10"] * 2 + ["top_1"] * 2, ["cost", "ms_per_query"] * 2, strict=True
    ):
        assert axes.get_xscale() == "log"
        found = {point for line in drawn(axes).values() for point in line}
        expected = {(getattr(row, column), 100 * row.value) for row in rows if row.metric == metric}
        np.testing.assert_allclose(sorted(found), sorted(expected))
    labels = [axes.get_xlabel() for axes in figure.axes[2:]]
    assert labels == ["million multiply-adds per query", "measured milliseconds per query (CPU)"]
    searches = [
        (row.cost, 100 * row.value) for row in rows if row.shortlist_dim == row.rerank_dim and row.metric == "top_1"
    ]
    assert drawn(figure.axes[2])["one search, no reranking (numbers: its dims)"] == searches
    assert {text.get_text() for text in figure.axes[2].texts} == {"8", "16", "32", "64"}


def test_fault_26_rows_without_measured_time_get_no_axis_of_time():
    figure = adaptive_retrieval(adaptive_rows(timed=False))
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "million multiply-adds per query"]


def test_figure_8_shows_mean_and_deviation_of_seeds():
    figure = adaptive_retrieval([row for seed in (0, 1, 4) for row in adaptive_rows(f"mrl_{seed}", seed)])
    assert "3 seeds" in figure.get_suptitle()
    [bars] = figure.axes[0].containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * statistics.stdev((0, 0.01, 0.04)))


def test_refuses_what_one_figure_cannot_show():
    rows = adaptive_rows()
    with pytest.raises(UserError, match="different seeds"):
        adaptive_retrieval([*rows, *adaptive_rows("other")])
    with pytest.raises(UserError, match=r"\['MRL', 'MRL-E'\]"):
        adaptive_retrieval([*rows, *adaptive_rows("other", 1, "MRL-E")])
    with pytest.raises(UserError, match="no rows of metric"):
        adaptive_retrieval(ROWS)
    for figure in (retrieval_by_dim, baselines_by_dim, interpolation):
        with pytest.raises(UserError, match=r"\['digits', 'other'\]"):
            figure([*ROWS, *(dataclasses.replace(row, dataset="other") for row in ROWS)])


def test_every_legend_lies_within_its_figure(tmp_path):
    for i, figure in enumerate((retrieval_by_dim(ROWS), interpolation(ROWS), adaptive_retrieval(adaptive_rows()))):
        save(figure, tmp_path / str(i))
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
