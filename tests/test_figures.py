import dataclasses
import statistics

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.figures import accuracy_by_dim, save
from mrl.results import Source

STUDIES = ("classification", "retrieval")
DIMS = (8, 16, 32, 64)


def rows_of(method, run, accuracies, seed=0, dataset="digits", metric="top_1"):
    """Rows of both studies, 1-NN 0.1 lower; ``accuracies`` is {dim: value}."""
    source = Source(dataset, run, seed, 32, 28, False)
    return [
        source.row(study, method, metric, value - 0.1 * i, 360, dim=dim)
        for i, study in enumerate(STUDIES)
        for dim, value in accuracies.items()
    ]


def lines_of(axes):
    """{label: (dims, accuracies in percent)} as drawn, error bars or not."""
    containers = {c.get_label(): c.lines[0] for c in axes.containers}
    plain = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {label: tuple(map(list, line.get_data())) for label, line in (plain | containers).items()}


ROWS = [
    *rows_of("MRL", "mrl", dict(zip(DIMS, (0.8, 0.9, 0.95, 0.96), strict=True))),
    *rows_of("MRL-E", "mrl_e", dict(zip(DIMS, (0.7, 0.9, 0.94, 0.95), strict=True))),
    *rows_of("FF truncated", "ff", dict(zip(DIMS, (0.2, 0.5, 0.9, 0.97), strict=True))),
    *rows_of("FF", "ff", {64: 0.97}),
    *rows_of("FF", "ff8", {8: 0.79}),
    *rows_of("FF", "ff32", {32: 0.93}),
]


def test_the_drawn_lines_are_the_rows_and_fixed_feature_models_join():
    figure = accuracy_by_dim(ROWS)
    for axes, lower in zip(figure.axes, (0, 10), strict=True):
        lines = lines_of(axes)
        assert len(lines) == 4
        expected = {
            "MRL": [(8, 80), (16, 90), (32, 95), (64, 96)],
            "MRL-E": [(8, 70), (16, 90), (32, 94), (64, 95)],
            "FF (one model per size)": [(8, 79), (32, 93), (64, 97)],
            "FF, plain truncation": [(8, 20), (16, 50), (32, 90), (64, 97)],
        }
        for label, points in expected.items():
            assert lines[label][0] == [dim for dim, _ in points]
            np.testing.assert_allclose(lines[label][1], [value - lower for _, value in points])


def test_order_of_rows_changes_nothing():
    forward, backward = (accuracy_by_dim(rows) for rows in (ROWS, ROWS[::-1]))
    assert [lines_of(axes) for axes in forward.axes] == [lines_of(axes) for axes in backward.axes]


def test_one_legend_entry_per_method_and_labels_with_units():
    figure = accuracy_by_dim(ROWS)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "MRL",
        "MRL-E",
        "FF (one model per size)",
        "FF, plain truncation",
    ]
    assert not any(axes.get_legend() for axes in figure.axes)
    assert "digits" in figure.get_suptitle() and "360" in figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_xlabel() == "embedding size (dims)"
        assert axes.get_ylabel() == "top-1 accuracy (%)"


def test_sizes_stand_as_whole_numbers_on_a_logarithmic_axis(tmp_path):
    figure = accuracy_by_dim(ROWS)
    save(figure, tmp_path / "figure")
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16", "32", "64"]


def test_tick_numbers_keep_apart_where_sizes_are_many():
    dims = sorted({*(2**i for i in range(3, 12)), *(3 * 2**i for i in range(2, 10))})
    [axes, _] = accuracy_by_dim(rows_of("MRL", "mrl", dict.fromkeys(dims, 0.5))).axes
    ticks = axes.get_xticks()
    assert ticks[-1] == 2048
    assert set(ticks) <= set(dims)
    assert min(np.diff(np.log2(ticks))) * 12 > 8


def test_several_seeds_are_drawn_as_mean_and_standard_deviation():
    values = {0: 0.80, 1: 0.84, 2: 0.91}
    rows = [row for seed, value in values.items() for row in rows_of("MRL", f"mrl_{seed}", {8: value, 16: 0.9}, seed)]
    figure = accuracy_by_dim([*rows, *rows_of("FF", "ff", {16: 0.95})])
    axes = figure.axes[0]
    np.testing.assert_allclose(lines_of(axes)["MRL"][1], [100 * statistics.mean(values.values()), 90])
    [bars] = axes.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * statistics.stdev(values.values()))
    assert len(figure.legends[0].get_texts()) == 2
    assert "standard deviation" in figure.get_suptitle() and "1 to 3 seeds" in figure.get_suptitle()
    assert "seed" not in accuracy_by_dim(ROWS).get_suptitle()


def test_different_models_of_one_method_and_seed_are_not_averaged():
    rows = [
        *rows_of("MRL", "small", {8: 0.5, 16: 0.6}),
        *rows_of("MRL", "large", {8: 0.8, 16: 0.9}),
        *rows_of("FF", "ff", {16: 0.7}),
    ]
    lines = lines_of(accuracy_by_dim(rows).axes[0])
    assert set(lines) == {"MRL: large", "MRL: small", "FF (one model per size)"}
    np.testing.assert_allclose(lines["MRL: small"][1], [50, 60])


def test_lines_differ_in_color_marker_and_dashes_also_where_there_are_many():
    runs = [row for i in range(5) for row in rows_of("MRL", f"run_{i}", {8: 0.1 * i + 0.2})]
    for rows in (ROWS, runs):
        lines = accuracy_by_dim(rows).axes[0].lines
        assert len({line.get_color() for line in lines}) == len(lines)
        assert len({line.get_marker() for line in lines}) == len(lines)


@pytest.mark.parametrize("studies", [STUDIES[:1], STUDIES[1:]])
def test_a_study_without_rows_gets_no_panel(studies):
    assert len(accuracy_by_dim([row for row in ROWS if row.study in studies]).axes) == 1


def test_all_that_is_drawn_lies_within_the_axes():
    extreme = [*rows_of("MRL", "mrl", {8: 0.1, 16: 1.0}), *rows_of("FF", "ff", {16: 1.0})]
    for axes in accuracy_by_dim(extreme).axes:
        low, high = axes.get_ylim()
        for _, values in lines_of(axes).values():
            assert low < min(values) and max(values) < high
        assert high < 103


def test_refuses_rows_of_several_datasets_or_none():
    with pytest.raises(UserError, match=r"\['digits', 'tiny_imagenet'\]"):
        accuracy_by_dim([*ROWS, *(dataclasses.replace(row, dataset="tiny_imagenet") for row in ROWS)])
    with pytest.raises(UserError, match="'top_5'"):
        accuracy_by_dim(ROWS, "top_5")


def test_save_writes_png_and_pdf(tmp_path):
    paths = save(accuracy_by_dim(ROWS), tmp_path / "new" / "accuracy")
    assert [path.name for path in paths] == ["accuracy.png", "accuracy.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
