"""What the figures of the notebooks draw, read back from their axes."""

import numpy as np
import pytest

from mrl.errors import UserError
from mrl.figures.coarse_to_fine import RIGHT, WRONG, grad_cam_sheet, neighbors_by_dim
from mrl.figures.deployment import cascade_in_use, retrieval_in_use, size_slider
from mrl.figures.geometry import block_statistics, cosine_distributions, prefix_maps
from mrl.figures.knowledge import accuracy_of_groups_and_classes, confusions, sizes_each_class_needs
from mrl.results import Source
from mrl.studies.adaptive_classification import CascadePoint
from mrl.studies.geometry import Blocks

SOURCE = Source("digits", "a", 0, 32, 32, False)


def lines(axes):
    """{label: (x, y)} of what is in the legend."""
    return {
        line.get_label(): tuple(map(list, line.get_data()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_groups_and_classes_are_lines_in_percent_and_trained_sizes_are_filled():
    rows = [
        SOURCE.row(study, "MRL", metric, value, 40, dim=dim)
        for study, metric, values in (
            ("prefix_knowledge", "top_1", {4: 0.3, 8: 0.9}),
            ("prefix_knowledge", "superclass_top_1", {4: 0.6, 8: 0.95}),
            ("classification", "top_1", {8: 0.8}),
        )
        for dim, value in values.items()
    ]
    [axes] = accuracy_of_groups_and_classes(rows, [8]).axes
    drawn = lines(axes)
    assert drawn["right group, 1-NN"] == ([4, 8], [60, 95])
    assert drawn["right class, 1-NN"] == ([4, 8], [30, 90])
    assert drawn["right class, linear classifier"] == ([8], [80])
    filled = [line for line in axes.lines if line.get_label().startswith("_") and len(line.get_xdata())]
    assert all(list(line.get_xdata()) == [8] for line in filled) and len(filled) == 3
    with pytest.raises(UserError, match="no rows of what a prefix knows"):
        accuracy_of_groups_and_classes([], [8])


def test_confusions_show_numbers_and_the_worst_classes_of_many():
    counts = np.array([[[3, 1], [0, 4]], [[4, 0], [0, 4]]])
    first, second = confusions(counts, [4, 8], [4, 8], ["a", "b"]).axes
    assert [axes.get_title() for axes in (first, second)] == ["4 dims: 1 of 8 wrong", "8 dims: 0 of 8 wrong"]
    assert sorted(text.get_text() for text in first.texts) == ["1", "3", "4"]
    many = np.eye(50, dtype=np.int64)[None] * 5
    many[0, 40, 41] = 9
    [axes] = confusions(many, [8], [8], [f"c{i}" for i in range(50)]).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 30 and "c40" in names and "c49" not in names


def test_the_class_that_needs_most_stands_first_and_one_without_images_nowhere():
    [axes] = sizes_each_class_needs(np.array([8, 32, 0]), [8, 16, 32], ["a", "b", "c"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in axes.patches] == [3, 1]


def test_neighbors_of_another_class_are_dashed():
    images = np.zeros((2, 4, 4, 3))
    figure = neighbors_by_dim(images[0], "cat", {8: (images, ["dog", "cat"]), 32: (images, ["cat", "cat"])})
    frames = [axes.patches[0] for axes in figure.axes if axes.patches]
    assert [frame.get_linestyle() for frame in frames] == ["--", "solid", "solid", "solid"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["8 dims", "32 dims"]


def test_heat_lies_over_each_image_under_what_its_size_says():
    images, heat = np.zeros((2, 4, 4, 3)), np.arange(2 * 2 * 16.0).reshape(2, 2, 4, 4) / 64
    axes = np.reshape(grad_cam_sheet(images, ["a", "b"], heat, [8, 32], [["a", "a"], ["a", "b"]]).axes, (2, 3))
    for i in range(2):
        for g in range(2):
            np.testing.assert_array_equal(axes[i, g + 1].images[1].get_array(), heat[g, i])
    assert axes[1, 1].get_title() == "8 dims: a" and axes[1, 1].title.get_color() == WRONG
    assert axes[1, 2].get_title() == "32 dims: b" and axes[1, 2].title.get_color() == RIGHT


def adaptive_rows(ms=2.0):
    points = [("adaptive_retrieval", 8, 8), ("adaptive_retrieval", 8, 32), ("adaptive_retrieval", 32, 32)]
    return [
        SOURCE.row(
            study, "MRL", "map@10", 0.5 + i / 10, 40, shortlist_dim=dim, shortlist_size=200, rerank_dim=end,
            cost=1.0, ms_per_query=ms and ms * (i + 1),
        )
        for i, (study, dim, end) in enumerate([*points, ("funnel_retrieval", 8, 32)])
    ]  # fmt: skip


def test_retrieval_is_drawn_by_time_and_by_bytes_and_the_chosen_size_is_ringed():
    by_time, by_bytes = retrieval_in_use(adaptive_rows(), 8).axes
    plain = "one search, no reranking (numbers: its dims)"
    assert lines(by_time)[plain] == ([2, 6], [50, 70]) and lines(by_bytes)[plain] == ([32, 128], [50, 70])
    assert lines(by_bytes)["shortlist, reranked at full width"] == ([32], [60])
    assert lines(by_bytes)["funnel"] == ([32], [80])
    rings = [line for line in by_bytes.lines if line.get_markersize() == 15]
    assert [list(ring.get_xdata()) for ring in rings] == [[32], [32], [32]]
    with pytest.raises(UserError, match="no measured time"):
        retrieval_in_use(adaptive_rows(ms=None), 8)
    with pytest.raises(UserError, match="no rows of adaptive retrieval"):
        retrieval_in_use([], 8)


def test_the_cascade_is_drawn_beside_single_sizes():
    cascades = [CascadePoint(16, 0.7, 9.0, 36.0, 3.0), CascadePoint(32, 0.8, 12.0, 48.0, 4.0)]
    alone = [CascadePoint(8, 0.6, 8.0, 32.0, 1.0), CascadePoint(32, 0.8, 32.0, 128.0, 2.0)]
    figure = cascade_in_use(cascades, alone, 32, "digits")
    by_time, by_bytes = figure.axes
    assert lines(by_bytes)["cascade, by its largest size"] == ([36, 48], [70, 80])
    assert lines(by_time)["one size"] == ([1, 2], [60, 80])
    assert "up to 32 dims allowed, 12.0 used on average, 80.00% right" in figure.get_suptitle().replace("\n", " ")


def test_a_slider_draws_where_it_is_moved_to(monkeypatch):
    pytest.importorskip("ipywidgets")
    import IPython.display

    shown, updates = [], []

    class Handle:
        def update(self, picture):
            updates.append(picture)

    monkeypatch.setattr(IPython.display, "display", lambda what, display_id=None: shown.append(what) or Handle())
    size_slider(lambda dim: f"picture of {dim}", [8, 16, 32], start=16)
    picture, slider = shown
    slider.value = 32
    assert picture == "picture of 16" and updates == ["picture of 32"]
    with pytest.raises(UserError, match=r"start is 9; allowed are the sizes \[8, 16\]"):
        size_slider(str, [8, 16], start=9)


def test_blocks_maps_and_cosines_are_drawn_as_given():
    found = Blocks((8, 16), np.array([2.0, 0.5]), np.array([0.9, 0.4]), np.array([3.0, 2.0]), np.array([3.0, 4.0]))
    variance, between, rank = block_statistics({"run": found}).axes
    assert lines(variance)["run"] == ([8, 16], [2, 0.5])
    assert lines(between)["run"] == ([8, 16], [90, 40]) and lines(rank)["run"] == ([8, 16], [3, 4])

    places, labels = np.array([[0.0, 0], [2, 0], [5, 5]]), np.array([0, 0, 1])
    [axes] = prefix_maps({8: places}, labels, ["x", "y"]).axes
    assert [text.get_text() for text in axes.texts] == ["x", "y"] and axes.texts[0].xy == (1, 0)
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 3

    [axes] = cosine_distributions({8: (np.array([0.9, 1.0]), np.array([-0.5, 0.5]))}).axes
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(200)  # each kind 100%
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0.95, 0])
    assert axes.get_xlim()[0] < -1
    [axes] = cosine_distributions({8: (np.array([0.9]), np.array([0.1]))}).axes
    assert axes.get_xlim()[0] > -0.1
