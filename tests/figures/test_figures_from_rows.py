"""What the figures draw from rows, read back from their axes."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mrl.errors import UserError
from mrl.figures import FIGURES, adaptive_retrieval, figures_of, save
from mrl.figures.geometry import confusions
from mrl.figures.quantization import bytes_table
from mrl.figures.style import METHOD_STYLES, NothingToDraw
from mrl.paper import paper_rows
from mrl.results import METHODS, Source, data_title
from mrl.studies.adaptive_retrieval import ablation, funnels, pairs

DIMS = (8, 16, 32)
SEEDS = {0: 0.5, 1: 0.56, 2: 0.68}
# What each figure is drawn from: (study, metric, group), each with a value for every size.
SOURCES = {
    "accuracy_by_dim": [("classification", "top_1", None), ("retrieval", "top_1", None)],
    "map_by_dim": [("classification", "top_1", None), ("retrieval", "map@10", None)],
    "interpolation": [("classification", "top_1", None), ("retrieval", "top_1", None)],
    "superclasses": [("hierarchy", "superclass_top_1", None), ("hierarchy", "superclass_top_1", "dog")],
    "within_superclasses": [("hierarchy", "top_1_within", "dog"), ("hierarchy", "top_1", "dog")],
    "robustness": [("robustness", "top_1", None)],
    "few_shot": [("few_shot", "top_1_1_shot", None), ("few_shot", "top_1_5_shot", None)],
    "cascade": [("cascade", "top_1", None)],
    "first_correct": [("oracle", "first_correct", None)],
    "classes": [("per_class", "top_1", "cat"), ("per_class", "top_1", "dog")],
}


def rows_of(sources, values, method="MRL", run="run", seed=0, dataset="digits", n=50):
    """``values`` is {dim: value}, the same for each of ``sources``, (study, metric, group)."""
    source = Source(dataset, run, seed, 32, 28, False)
    return [
        source.row(study, method, metric, value, n, dim=dim, group=group, expected_dim=dim and float(dim))
        for study, metric, group in sources
        for dim, value in values.items()
    ]


def rows_for(name, seed=0, run=None, method="MRL", dims=DIMS, **of):
    """Rows of one run for a figure: the value at ``dims[g]`` is that of its seed + g / 100; size 12 is not trained."""
    method = f"{method} cascade" if name == "cascade" else method
    of |= {"method": method, "run": run or f"{method}_{seed}", "seed": seed}
    between = rows_of([("retrieval", "top_1", None)], {12: SEEDS[seed]}, **of) if name == "interpolation" else []
    return between + rows_of(SOURCES[name], {dim: SEEDS[seed] + g / 100 for g, dim in enumerate(dims)}, **of)


def drawn(axes):
    """``{label: (x, y)}`` of lines, with error bars or without."""
    lines = {line.get_label(): line for line in axes.lines}
    lines |= {c.get_label(): c.lines[0] for c in axes.containers if hasattr(c, "lines") and c.lines[0] is not None}
    return {k: tuple(np.round(line.get_xydata().T, 9).tolist()) for k, line in lines.items() if not k.startswith("_")}


def bars(axes):
    """``{label: (values, heights of their error bars)}`` of lines."""
    found = {}
    for container in axes.containers:
        if container.lines[2] and container.get_label()[0] != "_":
            heights = [float(np.ptp(segment[:, 1])) for segment in container.lines[2][-1].get_segments()]
            found[container.get_label()] = (list(container.lines[0].get_ydata()), heights)
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def heading(figure):
    return figure.get_suptitle().replace("\n", " ")


ACCURACY = SOURCES["accuracy_by_dim"]
ROWS = [
    *rows_of(ACCURACY, {8: 0.8, 16: 0.9, 32: 0.95}, run="mrl"),
    *rows_of(ACCURACY, {8: 0.7, 16: 0.9, 32: 1.0}, "MRL-E", "mrl_e"),
    *rows_of(ACCURACY, {8: 0.2, 16: 0.5, 32: 0.9}, "FF truncated", "ff"),
    *rows_of(ACCURACY, {32: 0.97}, "FF", "ff"),
    *rows_of(ACCURACY, {8: 0.79}, "FF", "ff8"),
]


def test_lines_are_the_rows_and_fixed_feature_models_join_in_any_order_of_rows():
    for rows in (ROWS, ROWS[::-1]):
        figure = FIGURES["accuracy_by_dim"](rows)
        for axes in figure.axes:
            assert drawn(axes) == {
                "MRL": ([8, 16, 32], [80, 90, 95]),
                "MRL-E": ([8, 16, 32], [70, 90, 100]),
                "FF (one model per size)": ([8, 32], [79, 97]),
                "FF, plain truncation": ([8, 16, 32], [20, 50, 90]),
            }
            assert (axes.get_xlabel(), axes.get_ylabel()) == ("embedding size (dims)", "top-1 accuracy (%)")
            assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16", "32"]
        assert legend(figure) == list(drawn(figure.axes[0]))
        assert heading(figure) == "Handwritten digits: 50 images"


LISTS = [[2**i for i in range(3, 12)], [10 * 2**i for i in range(8)], [8, 32, 512]]


def faults(figure, max_inches=14.5):
    """Return what a reader misses: part of the legend or title, a number of an axis, a line's own color."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, found = canvas.get_renderer(), []
    if figure.get_figwidth() > max_inches:
        found.append(f"{figure.get_figwidth()} inches wide")
    for shown in [figure._suptitle, *figure.legends]:
        box = shown.get_window_extent(renderer)
        if box.x0 < 0 or box.x1 > figure.bbox.x1 or box.y0 < 0 or box.y1 > figure.bbox.y1:
            found.append(f"{shown} leaves the canvas")
    for axes in filter(lambda axes: axes.get_visible(), figure.axes):
        box, title = axes.get_tightbbox(renderer), figure._suptitle
        if box.y0 < 0 or box.y1 > title.get_window_extent(renderer).y0 or box.x0 < 0 or box.x1 > figure.bbox.x1:
            found.append(f"{axes.get_title()} leaves the canvas or meets the title")
        low, high = axes.get_xlim()
        ticks = [text for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high]
        boxes = [text.get_window_extent(renderer) for text in ticks if text.get_visible() and text.get_text()]
        if any(a.x1 >= b.x0 for a, b in itertools.pairwise(sorted(boxes, key=lambda box: box.x0))):
            found.append(f"numbers overlap below {axes.get_title()}")
        colors = [container.lines[0].get_color() for container in axes.containers if container.get_label()[0] != "_"]
        if len(set(colors)) < len(colors):
            found.append(f"two lines of one color in {axes.get_title()}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_every_figure_of_runs_of_mixed_sizes_is_tidy(name):
    runs = enumerate((dims, seed) for dims in LISTS for seed in range(3))
    names = "a_run_of_mine_with_a_long_name_{}".format
    rows = [row for i, (dims, seed) in runs for row in rows_for(name, seed, names(i), dims=dims)]
    assert faults(FIGURES[name](rows)) == []


@pytest.mark.parametrize("letters", [1, 30])
def test_confusions_are_tidy_whatever_the_length_of_names(letters):
    assert faults(confusions(np.ones((2, 10, 10), int), [2, 64], [2, 64], ["n" * letters] * 10, "digits")) == []


def test_the_ends_of_an_axis_have_numbers_that_do_not_overlap():
    dims = sorted({*LISTS[0], *LISTS[1]})
    [axes, _] = FIGURES["accuracy_by_dim"](rows_of(ACCURACY, dict.fromkeys(dims, 0.5))).axes
    assert (axes.get_xticks()[0], axes.get_xticks()[-1]) == (8, 2048) and 1280 not in axes.get_xticks()
    codes = {(dim, "float32", 4 * dim): 0.5 for dim in LISTS[1]} | {(80, "sign bits", 10): 0.2}
    assert faults(FIGURES["accuracy_by_bytes"](coded_rows("MRL", 0, codes))) == []


def test_all_methods_have_styles_of_their_own_beside_baselines_and_titles_name_the_data():
    methods = [name for name in METHOD_STYLES if "cascade" not in name]
    rows = [row for method in methods for row in rows_of(ACCURACY, {8: 0.5, 16: 0.6}, method, dataset="my_photos")]
    figure = FIGURES["baselines"](rows)
    assert faults(figure, max_inches=20) == []
    assert [axes.get_title() for axes in figure.axes] == ["linear classification", "1-nearest neighbor"]
    assert len({container.lines[0].get_marker() for container in figure.axes[0].containers}) == len(methods)
    assert len(legend(figure)) == len(methods) and heading(figure) == "my photos: 50 images"
    assert len(legend(FIGURES["accuracy_by_dim"](rows))) == len([*METHODS, "FF PCA"])
    both = rows_of(ACCURACY, {8: 0.5, 16: 0.6}, "MRL weighted distilled")  # a model without a style
    assert legend(FIGURES["accuracy_by_dim"](both)) == ["MRL weighted distilled"]
    assert data_title("tiny_imagenet") == "Tiny-ImageNet" and data_title("tiny_imagenet_100") == "Tiny-ImageNet 100"


def test_accuracy_of_classes_stands_beside_that_of_superclasses_as_the_mean_over_images():
    rows = rows_of([("hierarchy", "superclass_top_1", None)], {8: 0.9, 16: 0.95}, n=40)
    rows += rows_of([("hierarchy", "top_1", "dog")], {8: 0.2, 16: 0.6}, n=30)
    rows += rows_of([("hierarchy", "top_1", "cat")], {8: 0.6, 16: 1.0}, n=10)
    superclasses, classes = FIGURES["superclasses"](rows).axes
    assert drawn(superclasses)["MRL"][1] == [90, 95] and drawn(classes)["MRL"][1] == [30, 70]
    low, high = classes.get_ylim()
    assert low < 30 and high > 95 and superclasses.get_ylim() == (low, high)


def test_many_models_of_one_method_differ_in_color_and_their_legend_fits(tmp_path):
    runs = [f"a_run_with_a_very_long_name_that_fills_half_of_a_figure_{i}" for i in range(16)]
    rows = [row for run in runs for row in rows_for("map_by_dim", run=run)]
    figure = FIGURES["map_by_dim"](rows + rows_for("map_by_dim", method="FF truncated"))
    assert legend(figure) == [*sorted(f"MRL: {run}" for run in runs), "FF, plain truncation"]
    assert faults(figure) == []
    paths = save(figure, tmp_path / "new" / "figure")
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"%PDF"]


@pytest.mark.parametrize("name", FIGURES)
def test_rows_of_several_datasets_are_refused_and_no_rows_are_nothing_to_draw(name):
    with pytest.raises(NothingToDraw):
        FIGURES[name]([])
    if name in SOURCES:
        with pytest.raises(UserError, match=r"one dataset, but the rows are of \['digits', 'tiny'\]"):
            FIGURES[name]([*rows_for(name), *rows_for(name, 1, dataset="tiny")])


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "classes"])
def test_seeds_of_one_recipe_are_their_mean_with_one_standard_deviation(name):
    figure = FIGURES[name]([row for seed in SEEDS for row in rows_for(name, seed)])
    panels = [bars(axes) for axes in figure.axes if axes.get_visible()]
    assert panels and all(panels)
    for panel in panels:
        [(values, heights)] = panel.values()
        np.testing.assert_allclose(values[:3], [58, 59, 60])
        np.testing.assert_allclose(heights[:3], 200 * statistics.stdev(SEEDS.values()))
    assert "mean and standard deviation of 3 seeds" in heading(figure)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dims", [DIMS, (8, 20, 32)], ids=["one seed twice", "other sizes"])
def test_models_that_differ_in_more_than_their_seed_are_not_averaged(name, dims):
    figure = FIGURES[name](rows_for(name, 0, "one") + rows_for(name, int(dims != DIMS), "other", dims=dims))
    shown = [axes.get_title() for axes in figure.axes] + (legend(figure) if figure.legends else [])
    for run in ("one", "other"):
        assert any(label.endswith(f": {run}") for label in shown), shown
    assert "seeds" not in heading(figure)


def test_figure_5_fills_trained_sizes_and_leaves_those_between_hollow_and_out_of_other_figures():
    rows = rows_for("interpolation") + rows_for("accuracy_by_dim", method="FF", dims=(32,))
    [axes] = FIGURES["interpolation"](rows).axes
    assert drawn(axes)["MRL"] == ([8, 16, 32], [50, 51, 52])
    [trained, between] = [c.lines[0] for c in axes.containers if c.get_label() in ("MRL", "_between")]
    assert trained.get_markerfacecolor() == trained.get_color() == between.get_color()
    assert (between.get_markerfacecolor(), between.get_linestyle()) == ("white", "None")
    assert [*map(list, between.get_data())] == [[12], [50]]
    for axes in FIGURES["accuracy_by_dim"](rows).axes:
        assert drawn(axes)["MRL"][0] == [8, 16, 32]
    for some in (rows_for("accuracy_by_dim"), [row for row in rows if row.study == "retrieval"]):
        with pytest.raises(NothingToDraw, match="between the trained"):
            FIGURES["interpolation"](some)


PAPER = {
    "accuracy_by_dim": ("MRL (paper)", 66.63),
    "map_by_dim": ("MRL (paper)", 56.74),
    "interpolation": ("MRL (paper)", 62.19),
    "cascade": ("MRL cascade (paper)", 73.79),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values_are_dashed_beside_as_many_images_of_imagenet_only(name):
    label, first = PAPER[name]
    n = 40_000 if name == "cascade" else 50_000
    for dataset, num_images in (("digits", n), ("imagenet_v2", n), ("imagenet", 2000)):
        figure = FIGURES[name](rows_for(name, dataset=dataset, n=num_images))
        assert not any("paper" in text for axes in figure.axes for text in drawn(axes))
    figure = FIGURES[name](rows_for(name, dataset="imagenet", n=n))
    for axes in figure.axes:
        [line] = [line for line in axes.lines if line.get_label() == label]
        assert line.is_dashed() and (12 in line.get_xdata()) == (name == "interpolation")
    assert drawn(figure.axes[0])[label][1][0] == pytest.approx(first)
    assert legend(figure).count(label) == 1
    other = FIGURES[name](rows_for(name, method="MRL-E", dataset="imagenet", n=n))
    assert "MRL (paper)" not in legend(other) and "MRL cascade (paper)" not in legend(other)


def cascade_rows(method, points, run="mrl"):
    """``points`` is {cap: (accuracy, expected dim)}; one standard deviation over splits is 0.01 and 2 dims."""
    source = Source("digits", run, 0, 32, 28, True)
    return [
        source.row("cascade", method, metric, value, 40, dim=cap, expected_dim=expected)
        for cap, point in points.items()
        for metric, (value, expected) in (("top_1", point), ("top_1_std", (0.01, 2.0)))
    ]


def test_cascades_are_drawn_by_expected_dim_with_bars_over_splits_and_caps_above():
    rows = cascade_rows("MRL cascade", {16: (0.7, 10), 32: (0.8, 16), 64: (0.82, 24)})
    ff = cascade_rows("FF", {8: (0.6, 8), 32: (0.75, 32)}, run="ff")
    figure = FIGURES["cascade"](rows + ff)
    [axes] = figure.axes
    assert drawn(axes) == {"MRL cascade": ([10, 16, 24], [70, 80, 82]), "FF (one model per size)": ([8, 32], [60, 75])}
    across, along = (bar.get_segments()[0] for bar in axes.containers[0].lines[2])
    np.testing.assert_allclose([across, along], [[[8, 70], [12, 70]], [[10, 69], [10, 71]]])
    assert [text.get_text() for text in axes.texts] == ["≤16", "≤32", "≤64"]
    assert heading(figure).endswith("held out from fitting; mean and standard deviation over random splits")
    below, above = ({cap: (y + by, 9) for cap, y in ((16, 0.7), (32, 0.8))} for by in (-0.1, 0.1))
    several = FIGURES["cascade"](cascade_rows("MRL cascade", below) + cascade_rows("MRL weighted cascade", above))
    assert legend(several) == ["MRL cascade", "MRL cascade, weighted loss"]
    assert [text.xy for text in several.axes[0].texts] == [pytest.approx((9, 80))]  # the next is too near
    colors = {name: look["color"] for name, look in METHOD_STYLES.items()}
    assert colors["MRL weighted cascade"] == colors["MRL weighted"] != colors["MRL"] == colors["MRL cascade"]
    for largest in (12.4, 13.7, 14.9):
        easy = FIGURES["cascade"](cascade_rows("MRL cascade", {20: (0.98, 11.2), 40: (0.98, largest)})).axes[0]
        assert np.sum((easy.get_xticks() > easy.get_xlim()[0]) & (easy.get_xticks() < easy.get_xlim()[1])) >= 2
    alone = FIGURES["cascade"](ff)
    assert not alone.axes[0].texts and "fit" not in heading(alone)


def oracle_rows(method, shares, dataset="digits", n=50):
    rows = rows_of([("oracle", "first_correct", None)], shares, method, dataset=dataset, n=n)
    return rows + rows_of([("oracle", "never_correct", None)], {None: 0.15}, method, dataset=dataset, n=n)


def test_shares_by_the_smallest_right_prefix_are_lines_and_none_stands_last():
    shares = {8: 0.7, 16: 0.1, 32: 0.05}
    figure = FIGURES["first_correct"](oracle_rows("MRL", shares) + oracle_rows("MRL-E", {8: 0.4, 64: 0.45}))
    [axes] = figure.axes
    assert drawn(axes) == {"MRL": ([8, 16, 32], [70, 10, 5]), "MRL-E": ([8, 64], [40, 45])}
    never = [c.lines[0] for c in axes.containers if c.get_label() == "_none"]
    assert [line.get_xydata().tolist() for line in never] == [[[128, 15]]] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "32", "64", "none"]
    assert faults(figure) == []
    [axes] = FIGURES["first_correct"](oracle_rows("MRL", shares, "imagenet", 50_000)).axes
    assert drawn(axes)["MRL (paper)"] == ([8, 16, 32, 64], pytest.approx([67.462, 8.782, 2.588, 18.46]))
    for others in (oracle_rows("MRL-E", shares, "imagenet", 50_000), oracle_rows("MRL", shares, "imagenet", 49_999)):
        assert "MRL (paper)" not in legend(FIGURES["first_correct"](others))


def search_rows(run="mrl", seed=0, timed=True, dims=(8, 16, 32, 64)):
    source = Source("digits", run, seed, 32, 28, False)
    plans = [("adaptive_retrieval", *plan) for plan in pairs(dims, 5000) + ablation(dims, 5000)]
    plans += [("funnel_retrieval", *plan) for plan in funnels(dims, 5000)]
    rows = []
    for study, dim, stages in plans:
        of = {"shortlist_dim": dim, "shortlist_size": stages[0][1], "rerank_dim": stages[-1][0]}
        of["cost"] = (5000 * dim + sum(size * length for size, length in stages)) / 1e6
        of["ms_per_query"] = 0.1 + of["cost"] if timed else None
        for i, metric in enumerate(("top_1", "map@10")):
            value = 0.9 - 1 / stages[-1][0] - 0.5 / dim - 0.1 * i - 0.01 * seed
            rows.append(source.row(study, "MRL", metric, value, 360, **of))
    return rows


def test_no_axis_of_percents_goes_above_100_where_all_values_are_nearly_that():
    for draw, rows in ((FIGURES["accuracy_by_dim"], rows_for("accuracy_by_dim")), (adaptive_retrieval, search_rows())):
        figure = draw([dataclasses.replace(row, value=0.99) for row in rows])
        assert all(100 < axes.get_ylim()[1] < 101 for axes in figure.axes)


def test_figure_8_has_every_row_against_multiply_adds_and_against_time():
    rows = search_rows()
    figure = adaptive_retrieval(rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["mAP@10 (%)", "", "top-1 accuracy (%)", ""]
    labels = ["million multiply-adds per query", "measured milliseconds per query (CPU)"]
    assert [axes.get_xlabel() for axes in figure.axes[2:]] == labels
    for i, axes in enumerate(figure.axes):
        metric, column = ("map@10", "top_1")[i // 2], ("cost", "ms_per_query")[i % 2]
        found = {point for x, y in drawn(axes).values() for point in zip(x, y, strict=True)}
        expected = {(getattr(row, column), 100 * row.value) for row in rows if row.metric == metric}
        np.testing.assert_allclose(sorted(found), sorted(expected))
    single = [row for row in rows if row.shortlist_dim == row.rerank_dim and row.metric == "top_1"]
    shown = drawn(figure.axes[2])["one search, no reranking (numbers: its dims)"]
    np.testing.assert_allclose(shown, [[row.cost for row in single], [100 * row.value for row in single]])
    assert {text.get_text() for text in figure.axes[2].texts} == {"8", "16", "32", "64"}


@pytest.mark.parametrize(
    "time",
    [lambda dim: None, lambda dim: 0.05 + 0.0003 * dim, {8: 0.1, 16: 0.3, 32: 0.2, 64: 0.25}.get],
    ids=["none", "noise", "up and down"],
)
def test_fault_26_times_that_do_not_grow_with_the_size_get_no_axis(time):
    rows = [dataclasses.replace(row, ms_per_query=time(row.shortlist_dim)) for row in search_rows()]
    assert [axes.get_xlabel() for axes in adaptive_retrieval(rows).axes] == ["", "million multiply-adds per query"]


def test_figure_8_shows_mean_and_deviation_of_seeds_and_other_sizes_in_a_figure_of_their_own():
    figures = figures_of([row for seed in (0, 1, 4) for row in search_rows(f"mrl_{seed}", seed)])
    [(name, figure)] = figures.items()
    assert name == "adaptive_retrieval_mrl" and "3 seeds" in heading(figure)
    np.testing.assert_allclose(bars(figure.axes[0])["funnel"][1], 200 * statistics.stdev((0, 0.01, 0.04)))
    weighted = [dataclasses.replace(row, method="MRL weighted") for row in search_rows()]
    [(name, figure)] = figures_of(weighted).items()
    assert name == "adaptive_retrieval_mrl_weighted_loss" and "queries; MRL, weighted loss (" in heading(figure)
    apart = figures_of(search_rows("a") + search_rows("b", 1, dims=(4, 32)))
    assert set(apart) == {"adaptive_retrieval_a", "adaptive_retrieval_b"}
    assert len(figures_of(search_rows("lr-1") + search_rows("LR_1", 1, dims=(4, 32)))) == 2
    assert set(figures_of(search_rows("a") + search_rows("b"))) == set(apart)


def test_figure_8_has_the_papers_two_lines_beside_as_many_queries():
    ours = [dataclasses.replace(row, run="mrl", value=row.value - 0.01) for row in paper_rows("imagenet", "table_11")]
    dashed = {k: v for k, v in drawn(adaptive_retrieval(ours).axes[0]).items() if "(paper)" in k}
    single, reranked = "one search, no reranking (paper)", "shortlist of 200, reranked at 2048 dims (paper)"
    assert set(dashed) == {single, reranked} and dashed[reranked][1][0] == pytest.approx(64.9)
    for other in ({"dataset": "digits"}, {"n": 1000}):
        figure = adaptive_retrieval([dataclasses.replace(row, **other) for row in ours])
        assert not any("(paper)" in label for label in drawn(figure.axes[0]))


def test_fault_14_with_and_without_the_reject_class_are_panels_apart_and_flips_are_told():
    metrics = [("hierarchy", name, None) for name in ("superclass_top_1", "superclass_top_1_with_reject")]
    rows = rows_of(metrics[:1], {8: 0.7, 16: 0.8}) + rows_of(metrics[1:], {8: 0.6, 16: 0.65}, n=50_000)
    figure = FIGURES["superclasses"](rows)
    first, second = figure.axes
    assert (drawn(first)["MRL"][1], drawn(second)["MRL"][1]) == ([70, 80], [60, 65])
    assert first.get_title() != second.get_title() and "TTA" not in heading(figure)
    figure = FIGURES["superclasses"]([dataclasses.replace(row, dataset="imagenet") for row in rows])
    assert "MRL (paper)" not in drawn(figure.axes[0])
    assert drawn(figure.axes[1])["MRL (paper)"][1][0] == pytest.approx(85.572)
    assert "the paper's values with flip TTA (inferred), ours without" in heading(figure)


def test_a_panel_per_superclass_the_one_that_gains_most_first_and_unused_ones_hidden():
    within = [("hierarchy", "top_1_within", f"s_{i}") for i in range(7)]
    rows = [row for i in range(7) for row in rows_of(within[i : i + 1], {8: 0.1 * i, 16: 0.9})]
    rows += rows_of(within, {8: 0.9, 16: 0.1}, "FF")
    all_axes = FIGURES["within_superclasses"](rows).axes
    shown = [axes for axes in all_axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"s {i} (n = 50)" for i in range(7)] and len(all_axes) == 10
    assert drawn(shown[3])["MRL"][1] == [30, 90]
    assert shown[0].get_ylim()[0] < 0 and shown[0].get_ylim()[1] > 90


def test_classes_are_shown_relative_to_the_largest_size_with_the_one_that_loses():
    cat, dog = (("per_class", "top_1", name) for name in ("cat", "dog"))
    rows = rows_of([cat], {8: 0.9, 16: 0.8, 32: 0.7}) + rows_of([dog], {8: 0.5, 16: 0.6, 32: 0.9})
    one_size = rows_of([cat, dog], {32: 0.5}, "FF", "ff")
    figure = FIGURES["classes"](rows + one_size)
    [axes] = figure.axes  # no empty panel for FF
    spots = axes.collections[0].get_offsets()
    np.testing.assert_allclose(sorted(spots[:, 1]), [-40, -30, 10, 20])
    assert set(2.0 ** np.round(np.log2(spots[:, 0]))) == {8, 16}  # dots stand near their own size
    assert [text.get_text() for text in axes.texts] == ["cat"]
    assert legend(figure) == ["the class that the largest size costs most"]
    assert axes.get_ylim()[0] < -40 and axes.get_ylim()[1] > 20
    assert "2 classes of 50 validation images each" in heading(figure)
    with pytest.raises(NothingToDraw):
        FIGURES["classes"](one_size)
    averaged = FIGURES["classes"](rows + rows_of([cat], {8: 0.5, 16: 0.8, 32: 0.7}, run="other", seed=1))
    assert "means of up to 2 seeds" in heading(averaged)
    np.testing.assert_allclose(sorted(averaged.axes[0].collections[0].get_offsets()[:, 1]), [-40, -30, 0, 10])


def coded_rows(method, seed, values):
    """``values`` is {(dim, code, bytes): value}; a code "... 50" has a second pass."""
    rows, source = [], Source("digits", f"{method}_{seed}", seed, 32, 28, False)
    for (dim, code, size), value in values.items():
        of = {"dim": dim, "code": code.removesuffix(" 50"), "bytes": size, "rerank_dim": dim}
        of["shortlist_size"] = 50 if code.endswith(" 50") else None
        rows += [source.row("quantization", method, metric, value, 50, **of) for metric in ("top_1", "map@10")]
    return rows


MRL_CODES = {(8, "float32", 32): 0.8, (16, "float32", 64): 0.9, (8, "int8", 8): 0.8, (16, "int8", 16): 0.7}
MRL_CODES |= {(16, "sign bits", 2): 0.3, (16, "sign bits 50", 2): 0.6}


def test_the_best_codes_by_bytes_are_joined_and_those_of_a_second_pass_are_below():
    rows = coded_rows("MRL", 0, MRL_CODES) + coded_rows("MRL", 1, {key: v + 0.1 for key, v in MRL_CODES.items()})
    figure = FIGURES["accuracy_by_bytes"](rows + coded_rows("FF", 0, {(8, "float32", 32): 0.5, (8, "int8", 8): 0.4}))
    assert [axes.get_xlabel() for axes in figure.axes] == ["bytes per vector that the search reads"] * 4
    above, _, below, _ = figure.axes
    assert drawn(above)["MRL"] == ([2, 8, 64], [35, 85, 95])  # int8 of 16 dims is no better than of 8
    assert drawn(below)["MRL"] == ([2, 8, 64], [65, 85, 95])
    assert drawn(above)["FF (one model per size)"] == ([8, 32], [40, 50])
    pale = [line for line in above.lines if line.get_alpha() and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in pale] == [[32, 64], [32]]
    assert "1 to 2 seeds" in heading(figure)
    np.testing.assert_allclose(bars(above)["MRL"][1], 2 * np.std([0, 10], ddof=1))
    with pytest.raises(UserError, match="one dataset"):
        FIGURES["accuracy_by_bytes"]([*rows, dataclasses.replace(rows[0], dataset="tiny")])


def test_the_table_of_bytes_has_the_fewest_that_reach_a_share_of_the_full_accuracy():
    ff = coded_rows("FF", 0, {(8, "float32", 32): 0.5, (8, "int8", 8): 0.4})
    head, *lines = bytes_table(coded_rows("MRL", 0, MRL_CODES) + ff)
    assert head == ["method", "code", *(f"{share}% of 90.00" for share in (90, 95, 98, 99, 100))]
    assert lines[0] == ["MRL", "float32", *["64 (16 x float32)"] * 5], "81 percent needs 16 dims"
    kinds = ("any code", "with second pass")
    assert [line[:3] for line in lines[1:3]] == [["MRL", kind, "64 (16 x float32)"] for kind in kinds]
    assert {cell for line in lines[3:] for cell in line[2:]} == {"-"}
    enough = {key: 0.9 if key[1] == "sign bits 50" else value for key, value in MRL_CODES.items()}
    assert bytes_table(coded_rows("MRL", 0, enough))[3][2] == "2 (16 x sign bits, best 50)"
    assert bytes_table(ROWS) == []


def test_figures_are_drawn_of_what_there_are_rows_of():
    assert set(figures_of(ROWS)) == {"accuracy_by_dim"}
    assert set(figures_of(rows_for("classes"))) == {"classes"}
    assert figures_of(rows_of([("per_class", "share_of_classes", "monotone")], {None: 0.5})) == figures_of([]) == {}
