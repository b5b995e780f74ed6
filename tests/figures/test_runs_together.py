"""Any set of runs in one figure: seeds are averaged with their spread, other models stand apart."""

import dataclasses
import statistics

import numpy as np
import pytest

from mrl.figures import FIGURES, adaptive_retrieval, figures_of
from mrl.paper import paper_rows
from mrl.results import Source

DIMS = (8, 16, 32)
# What each figure is drawn from: {study: metrics}, each with a value for every size.
DRAWN_FROM = {
    "accuracy_by_dim": {"classification": ["top_1"], "retrieval": ["top_1"]},
    "map_by_dim": {"classification": ["top_1"], "retrieval": ["map@10"]},
    "interpolation": {"classification": ["top_1"], "retrieval": ["top_1"]},
    "baselines": {"classification": ["top_1"], "retrieval": ["top_1", "map@10"]},
    "superclasses": {"hierarchy": ["superclass_top_1"]},
    "within_superclasses": {"hierarchy": ["top_1 within dog"]},
    "robustness": {"robustness": ["top_1"]},
    "few_shot": {"few_shot": ["top_1_1_shot", "top_1_5_shot"]},
    "cascade": {"cascade": ["top_1"]},
    "first_correct": {"oracle": ["first_correct"]},
    "classes": {"per_class": ["top_1 of class cat", "top_1 of class dog"]},
}
SEEDS = {0: 0.5, 1: 0.56, 2: 0.68}


def rows_of(name, seed, run=None, method="MRL", dims=DIMS, dataset="digits"):
    """One run's rows for a figure: its value at ``dims[g]`` is that of its seed + g / 100; figure 5 has size 12 too."""
    method = f"{method} cascade" if name == "cascade" else method
    source = Source(dataset, run or f"{method}_{seed}", seed, 32, 28, False)
    between = [source.row("retrieval", method, "top_1", SEEDS[seed], 50, dim=12)] if name == "interpolation" else []
    return between + [
        source.row(study, method, metric, SEEDS[seed] + g / 100, 50, dim=dim, expected_dim=float(dim))
        for study, metrics in DRAWN_FROM[name].items()
        for metric in metrics
        for g, dim in enumerate(dims)
    ]


def bars(axes):
    """``{label: (values, heights of their error bars)}``, lines and histograms alike."""
    found = {}
    for container in axes.containers:
        is_bars = hasattr(container, "patches")
        errors = container.errorbar if is_bars else container
        if not is_bars and container.lines[0] is None:
            continue  # the error bars of a histogram, once more
        if container.get_label() == "_between":
            continue  # sizes that were never trained
        *_, upright = errors.lines[2]
        heights = [float(np.ptp(segment[:, 1])) for segment in upright.get_segments()]
        values = [bar.get_height() for bar in container] if is_bars else container.lines[0].get_ydata()
        found[container.get_label()] = (list(values), heights)
    return found


@pytest.mark.parametrize("name", [name for name in DRAWN_FROM if name != "classes"])
def test_seeds_of_one_recipe_are_their_mean_with_one_standard_deviation(name):
    figure = FIGURES[name]([row for seed in SEEDS for row in rows_of(name, seed)])
    spread = 100 * statistics.stdev(SEEDS.values())
    panels = [bars(axes) for axes in figure.axes if axes.get_visible()]
    assert panels and all(panels)
    for panel in panels:
        [(values, heights)] = panel.values()
        np.testing.assert_allclose(values[:3], [58, 59, 60])
        np.testing.assert_allclose(heights[:3], 2 * spread)
    assert "3 seeds" in figure.get_suptitle().replace("\n", " ")


def test_classes_are_means_of_the_seeds_and_the_title_says_so():
    rows = [row for seed in SEEDS for row in rows_of("classes", seed)]
    figure = FIGURES["classes"](rows)
    assert "means of up to 3 seeds" in figure.get_suptitle().replace("\n", " ")
    assert len(figure.axes) == 1


@pytest.mark.parametrize("name", DRAWN_FROM)
@pytest.mark.parametrize("dims", [DIMS, (8, 20, 32)], ids=["one seed twice", "other sizes"])
def test_models_that_differ_in_more_than_their_seed_are_not_averaged(name, dims):
    other_seed = 0 if dims == DIMS else 1
    figure = FIGURES[name](rows_of(name, 0, "one") + rows_of(name, other_seed, "other", dims=dims))
    shown = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    shown |= {axes.get_title() for axes in figure.axes}
    for run in ("one", "other"):
        assert any(label.endswith(f": {run}") for label in shown), shown
    assert "seeds" not in figure.get_suptitle()


def test_fixed_feature_models_of_several_sizes_and_seeds_are_one_line():
    rows = [
        row
        for seed in (0, 1)
        for dim in DIMS
        for row in rows_of("accuracy_by_dim", seed, f"ff{dim}_{seed}", "FF", (dim,))
    ]
    for axes in FIGURES["accuracy_by_dim"](rows).axes:
        [(values, heights)] = bars(axes).values()
        np.testing.assert_allclose(values, 53)
        np.testing.assert_allclose(heights, 2 * statistics.stdev((50, 56)))


PAPER_FIGURES = {
    "accuracy_by_dim": "MRL (paper)",
    "map_by_dim": "MRL (paper)",
    "interpolation": "MRL (paper)",
    "baselines": "MRL (paper)",
    "cascade": "MRL cascade (paper)",
}


@pytest.mark.parametrize("name", PAPER_FIGURES)
def test_the_papers_lines_are_dashed_on_imagenet_and_on_no_other_data(name):
    for dataset in ("digits", "tiny_imagenet", "imagenet_v2"):
        figure = FIGURES[name](rows_of(name, 0, dataset=dataset))
        assert not any("paper" in line.get_label() for axes in figure.axes for line in axes.lines)
        assert not any("paper" in text.get_text() for text in figure.legends[0].get_texts())
    figure = FIGURES[name](rows_of(name, 0, dataset="imagenet"))
    for axes in figure.axes:
        [line] = [line for line in axes.lines if line.get_label() == PAPER_FIGURES[name]]
        assert line.is_dashed()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts.count(PAPER_FIGURES[name]) == 1


def test_the_papers_values_are_those_of_its_tables():
    first, second = FIGURES["accuracy_by_dim"](rows_of("accuracy_by_dim", 0, dataset="imagenet")).axes
    for axes, smallest, largest in ((first, 66.63, 76.8), (second, 62.19, 70.97)):
        [line] = [line for line in axes.lines if line.get_label() == "MRL (paper)"]
        assert (line.get_ydata()[0], line.get_ydata()[-1]) == pytest.approx((smallest, largest))
        assert list(line.get_xdata()) == [8, 16, 32, 64, 128, 256, 512, 1024, 2048], "none of figure 5's sizes between"


def test_adaptive_retrieval_has_the_papers_two_lines_on_imagenet_against_multiply_adds():
    ours = [dataclasses.replace(row, run="mrl", value=row.value - 0.01) for row in paper_rows("imagenet", "table_11")]
    figure = adaptive_retrieval(ours)
    dashed = {line.get_label(): line for line in figure.axes[0].lines if "(paper)" in line.get_label()}
    assert set(dashed) == {
        "one search, no reranking (paper)",
        "shortlist of 200, reranked at 2048 dims (paper)",
    }
    assert dashed["shortlist of 200, reranked at 2048 dims (paper)"].get_ydata()[0] == pytest.approx(64.9)
    elsewhere = adaptive_retrieval([dataclasses.replace(row, dataset="digits") for row in ours])
    assert not any("(paper)" in line.get_label() for line in elsewhere.axes[0].lines)


def adaptive_rows(run, seed, dims):
    source = Source("digits", run, seed, 32, 28, False)
    return [
        source.row(
            "adaptive_retrieval",
            "MRL",
            "top_1",
            0.5,
            50,
            shortlist_dim=small,
            shortlist_size=20,
            rerank_dim=dim,
            cost=0.01 * small + 0.001 * dim,
        )
        for small in dims
        for dim in dims
        if dim >= small
    ]


def test_adaptive_retrieval_of_other_sizes_has_a_figure_of_its_own():
    together = adaptive_rows("a", 0, DIMS) + adaptive_rows("b", 1, DIMS)
    assert set(figures_of(together)) == {"adaptive_retrieval_mrl"}
    apart = adaptive_rows("a", 0, DIMS) + adaptive_rows("b", 1, (4, 32))
    assert set(figures_of(apart)) == {"adaptive_retrieval_a", "adaptive_retrieval_b"}


def test_rows_of_further_images_that_tell_no_trained_sizes_leave_out_the_figure_that_needs_them():
    rows = [row for row in rows_of("accuracy_by_dim", 0) if row.study == "retrieval"]
    assert set(figures_of(rows)) == {"accuracy_by_dim"}


def test_a_figure_of_baselines_is_drawn_only_where_there_is_a_baseline():
    nested = rows_of("baselines", 0)
    assert "baselines" not in figures_of(nested)
    assert "baselines" in figures_of([*nested, *rows_of("baselines", 0, method="FF PCA")])
