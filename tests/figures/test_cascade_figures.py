import itertools

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.figures import cascade_by_expected_dim, first_correct_histogram
from mrl.results import Source


def source(dataset="digits", run="mrl", seed=0):
    return Source(dataset, run, seed, 32, 28, True)


def cascade_rows(method, points, **of):
    """``points`` is {cap: (accuracy, expected dim)}; spread 0.01 and 2 dims."""
    return [
        source(**of).row("cascade", method, metric, value, 40, dim=cap, expected_dim=expected)
        for cap, point in points.items()
        for metric, (value, expected) in (("top_1", point), ("top_1_std", (0.01, 2.0)))
    ]


def rows_of(dataset):
    return [
        *cascade_rows("MRL cascade", {16: (0.7, 10), 32: (0.8, 16), 64: (0.82, 24)}, dataset=dataset),
        *cascade_rows("MRL cascade, joint", {16: (0.7, 9), 32: (0.81, 15)}, dataset=dataset),
        *cascade_rows("FF", {8: (0.6, 8), 32: (0.75, 32)}, dataset=dataset, run="ff"),
    ]


def drawn(axes):
    """{label: (x, y)} of every line, with error bars or without."""
    bars = {c.get_label(): c.lines[0] for c in axes.containers}
    plain = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {label: tuple(map(list, line.get_data())) for label, line in (plain | bars).items()}


def test_points_are_expected_dim_against_percent_and_bars_the_spread():
    [axes] = cascade_by_expected_dim(rows_of("digits")).axes
    lines = drawn(axes)
    assert set(lines) == {
        "MRL cascade, thresholds pairwise",
        "MRL cascade, thresholds joint",
        "FF (one model per size)",
    }
    assert lines["MRL cascade, thresholds pairwise"][0] == [10, 16, 24]
    np.testing.assert_allclose(lines["MRL cascade, thresholds pairwise"][1], [70, 80, 82])
    assert lines["FF (one model per size)"] == ([8, 32], [60, 75])
    [pairwise] = [c for c in axes.containers if c.get_label() == "MRL cascade, thresholds pairwise"]
    across, along = (bar.get_segments()[0] for bar in pairwise.lines[2])
    np.testing.assert_allclose(across, [[8, 70], [12, 70]])
    np.testing.assert_allclose(along, [[10, 69], [10, 71]])
    assert [text.get_text() for text in axes.texts] == ["≤16", "≤32", "≤64"]


def test_the_papers_points_are_dashed_on_imagenet_and_nowhere_else():
    for dataset in ("digits", "tiny_imagenet", "imagenet_v2"):
        assert not any("paper" in label for label in drawn(cascade_by_expected_dim(rows_of(dataset)).axes[0]))
    [axes] = cascade_by_expected_dim(rows_of("imagenet")).axes
    dims, accuracies = drawn(axes)["MRL cascade (paper)"]
    assert (dims[3], accuracies[3]) == pytest.approx((37.19, 76.29))
    [line] = [line for line in axes.lines if line.get_label() == "MRL cascade (paper)"]
    assert line.is_dashed()


def test_several_runs_of_a_method_are_averaged():
    rows = cascade_rows("MRL cascade", {16: (0.7, 10)}) + cascade_rows("MRL cascade", {16: (0.8, 14)}, run="b", seed=1)
    [axes] = cascade_by_expected_dim(rows).axes
    assert drawn(axes)["MRL cascade, thresholds pairwise"] == ([12], [75])


def test_without_a_cascade_nothing_is_numbered_and_nothing_was_fitted():
    ff = [row for row in rows_of("digits") if row.method == "FF"]
    figure = cascade_by_expected_dim(ff)
    assert not figure.axes[0].texts
    text = figure.get_suptitle().replace("\n", " ")
    assert "fit" not in text and "40 validation images; mean and standard deviation over random draws of these" in text
    with_cascade = cascade_by_expected_dim(rows_of("digits")).get_suptitle().replace("\n", " ")
    assert "not fitted on" in with_cascade and "draws of the fitting images" in with_cascade


def oracle_rows(method, dataset="digits"):
    shares = {8: 0.7, 16: 0.1, 32: 0.05}
    rows = [source(dataset).row("oracle", method, "first_correct", v, 50, dim=dim) for dim, v in shares.items()]
    return [*rows, source(dataset).row("oracle", method, "never_correct", 0.15, 50)]


def test_bars_of_the_histogram_are_the_shares_and_none_comes_last():
    [axes] = first_correct_histogram([*oracle_rows("MRL"), *oracle_rows("MRL-E")]).axes
    assert [container.get_label() for container in axes.containers] == ["MRL", "MRL-E"]
    for container in axes.containers:
        np.testing.assert_allclose([bar.get_height() for bar in container], [70, 10, 5, 15])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "32", "none"]
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for container in axes.containers for bar in container]
    edges.sort()
    assert all(right <= left + 1e-9 for (_, right), (left, _) in itertools.pairwise(edges))


def test_the_papers_histogram_is_drawn_on_imagenet_only():
    assert not first_correct_histogram(oracle_rows("MRL")).axes[0].collections
    [axes] = first_correct_histogram(oracle_rows("MRL", "imagenet")).axes
    heights = [lines.get_segments()[0][0][1] for lines in axes.collections]
    np.testing.assert_allclose(heights, [67.462, 8.782, 2.588, 18.46])


def test_the_papers_histogram_is_drawn_only_beside_the_same_method_and_stands_in_the_legend():
    assert not first_correct_histogram(oracle_rows("MRL-E", "imagenet")).axes[0].collections
    figure = first_correct_histogram([*oracle_rows("MRL", "imagenet"), *oracle_rows("MRL-E", "imagenet")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MRL", "MRL-E", "MRL (paper)"]


@pytest.mark.parametrize("draw", [cascade_by_expected_dim, first_correct_histogram])
def test_refuses_no_rows_and_rows_of_several_datasets(draw):
    with pytest.raises(UserError, match="no rows of the"):
        draw([])
    both = [*rows_of("digits"), *rows_of("tiny"), *oracle_rows("MRL"), *oracle_rows("MRL", "tiny")]
    with pytest.raises(UserError, match=r"\['digits', 'tiny'\]"):
        draw(both)
