"""What the figures of the notebooks draw, read back from their axes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from mrl.figures.deployment import cascade_in_use, retrieval_in_use, size_slider
from mrl.figures.geometry import (
    accuracy_of_groups_and_classes,
    block_statistics,
    confusions,
    cosine_distributions,
    prefix_maps,
    sizes_each_class_needs,
)
from mrl.figures.neighbors import grad_cam_sheet, neighbor_grid, neighbors_of
from mrl.figures.style import GREEN, RED, save
from mrl.results import Source
from mrl.studies.adaptive_classification import CascadePoint
from mrl.studies.geometry import Blocks

SOURCE = Source("digits", "a", 0, 32, 32, False)


def lines(axes):
    """{label: (x, y)} of what is in the legend."""
    shown = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): tuple(np.round(line.get_xydata().T, 9).tolist()) for line in shown}


def test_groups_and_classes_are_lines_in_percent_and_trained_sizes_are_filled():
    values = {
        ("prefix_knowledge", "top_1"): {4: 0.3, 8: 0.9},
        ("prefix_knowledge", "superclass_top_1"): {4: 0.6, 8: 0.95},
        ("classification", "top_1"): {8: 0.8},
    }
    rows = [SOURCE.row(s, "MRL", m, value, 40, dim=dim) for (s, m), of in values.items() for dim, value in of.items()]
    [axes] = accuracy_of_groups_and_classes(rows, [8]).axes
    assert lines(axes) == {
        "right group, 1-NN": ([4, 8], [60, 95]),
        "right class, 1-NN": ([4, 8], [30, 90]),
        "right class, linear classifier": ([8], [80]),
    }
    filled = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in filled] == [[8]] * 3
    assert all(line.get_markerfacecolor() == line.get_color() for line in filled)


def test_confusions_show_numbers_and_the_worst_classes_of_many():
    counts = np.array([[[3, 1], [0, 4]], [[4, 0], [0, 4]]])
    first, second = confusions(counts, [4, 8], [4, 8], ["a", "b"], "digits").axes
    assert [axes.get_title() for axes in (first, second)] == ["4 dims: 1 of 8 wrong", "8 dims: 0 of 8 wrong"]
    numbers = {(*text.get_position(), text.get_text()) for text in first.texts}
    assert numbers == {(0, 0, "3"), (1, 0, "1"), (1, 1, "4")}
    many = np.eye(50, dtype=np.int64)[None] * 5
    many[0, 40, 41], many[0, 7, 3] = 9, 8
    figure = confusions(many, [8], [8], [f"c{i}" for i in range(50)], "digits", np.arange(50) % 2)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 20 and {"c40", "c41", "c3", "c7"} <= set(names)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["5"] * 20 + ["8", "9"]
    groups = [int(name[1:]) % 2 for name in names]
    assert groups == sorted(groups), "classes of a group stand together"
    title = figure.get_suptitle().replace("\n", " ")
    assert title == "digits; the 20 of 50 classes of the most frequent confusions at 8 dims"


def test_the_class_that_needs_most_stands_first_and_one_without_images_nowhere():
    counts = np.zeros((3, 3, 3), dtype=np.int64)
    counts[:, 0, 0] = 5
    counts[:, 1, 0], counts[2, 1] = 4, [0, 4, 0]  # "b" is right at 32 dims only
    figure = sizes_each_class_needs(counts, [8, 16, 32], ["a", "b", "c"], "digits")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in axes.patches] == [3, 1] and axes.yaxis_inverted()
    assert figure.get_suptitle() == "digits; an image is up to 25.0 points of its class"
    many = sizes_each_class_needs(np.eye(30, dtype=np.int64)[None], [8], [f"c{i}" for i in range(30)], "digits")
    assert "of 30 classes the 10 that need most and the 10 that need least" in many.get_suptitle().replace("\n", " ")
    assert len(many.axes[0].patches) == 20


def frame(axes):
    return axes.spines["top"].get_visible() and axes.spines["top"].get_linestyle()


def test_neighbors_of_another_class_are_dashed_and_photographs_shown_small():
    run = SimpleNamespace(
        classes=("cat", "dog"),
        image_classes=(),
        train=SimpleNamespace(labels=np.array([0, 1, 0])),
        val=SimpleNamespace(labels=np.array([1, 1, 0]), vectors=np.ones((3, 32))),
        pictures=lambda split, indices: np.float32(indices / 4)[:, None, None, None] * np.ones((4, 4, 3), np.float32),
    )
    found = {8: (np.array([[0, 0], [1, 2]]), None), 32: (np.array([[0, 0], [2, 0]]), None)}
    grid = np.reshape(neighbors_of(run, found, query=1, images=np.array([0, 2])).axes, (2, 3))
    assert [frame(axes) for axes in grid[:, 1:].flat] == ["--", "solid", "solid", "solid"]
    assert [axes.get_title() for axes in grid.flat] == ["query: cat", "dog", "cat", "", "cat", "cat"]
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["8 dims", "32 dims"]
    shown = [float(axes.images[0].get_array().mean()) for axes in grid.flat if axes.images]
    assert shown == [0.5, 0.25, 0.5, 0.5, 0]
    run.val.vectors[2, :8] = 0
    grid = np.reshape(neighbors_of(run, found, query=1, images=np.array([0, 2])).axes, (2, 3))
    assert [text.get_text() for text in grid[0, 1].texts] == ["all-zero prefix: no neighbors"]
    assert [len(axes.images) for axes in grid[:, 1:].flat] == [0, 0, 1, 1]
    photo = torch.zeros(3, 1000, 500, dtype=torch.uint8)
    [query, neighbor] = neighbor_grid(photo, {8: [(photo, "0.9")]}).axes
    assert query.images[0].get_array().shape == (224, 112, 3)
    assert neighbor.get_title() == "0.9" and not frame(neighbor), "a caption that is no class"


def test_heat_lies_over_each_image_under_the_class_that_its_size_predicts():
    heat = np.arange(2 * 2 * 16.0).reshape(2, 2, 4, 4) / 64
    run = SimpleNamespace(
        image_classes=(),
        val=SimpleNamespace(labels=np.array([1, 0, 1])),
        pictures=lambda split, indices: np.zeros((len(indices), 4, 4, 3), dtype=np.float32),
    )
    given = (np.array([1, 2]), heat, np.array([[0, 0], [0, 1]]), [8, 32], ["a", "b"], "Photographs: me")
    figure = grad_cam_sheet(run, *given)
    axes = np.reshape(figure.axes, (2, 3))
    for i, g in np.ndindex(2, 2):
        np.testing.assert_array_equal(axes[i, g + 1].images[1].get_array(), heat[g, i])
    assert axes[1, 1].get_title() == "8 dims: a" and axes[1, 1].title.get_color() == RED
    assert axes[1, 2].get_title() == "32 dims: b" and axes[1, 2].title.get_color() == GREEN
    assert figure.get_suptitle() == "Photographs: me"
    run.image_classes = ("cup", "pen")  # not the model's: no prediction is right or wrong
    axes = np.reshape(grad_cam_sheet(run, *given).axes, (2, 3))
    assert axes[0, 0].get_title() == "image of cup" and not any(map(frame, axes[:, 1:].flat))


def test_retrieval_is_drawn_by_time_and_by_bytes_and_the_chosen_size_is_ringed():
    plans = [("adaptive", 32, 32), ("adaptive", 8, 8), ("adaptive", 8, 32), ("funnel", 8, 32)]
    rows = []
    for i, (kind, *sizes) in enumerate(plans):
        of = dict(zip(("shortlist_dim", "rerank_dim"), sizes, strict=True))
        of |= {"shortlist_size": 200, "cost": 1.0, "ms_per_query": (3.0, 1.0, 3.5, 4.0)[i]}
        rows.append(SOURCE.row(f"{kind}_retrieval", "MRL", "map@10", 0.5 + i / 10, 40, **of))
    by_bytes, by_time = retrieval_in_use(rows, 8).axes
    single = "one search, no reranking (numbers: its dims)"
    assert lines(by_time)[single] == ([1, 3], [60, 50]) and lines(by_bytes)[single] == ([32, 128], [60, 50])
    assert lines(by_bytes)["shortlist, reranked at full width"] == ([32, 128], [70, 50])
    assert lines(by_bytes)["funnel"] == ([32], [80])
    knotted = [line for line in by_time.lines if line.get_label() == "shortlist, reranked at full width"]
    assert knotted[0].get_linestyle() == "None"  # times that fall
    as_fast = [dataclasses.replace(row, ms_per_query=1 + row.rerank_dim / 100) for row in rows]
    assert len(retrieval_in_use(as_fast, 8).axes) == 1, "overhead and noise are no time"
    rings = [line for line in by_bytes.lines if line.get_markersize() == 15]
    assert [list(ring.get_xdata()) for ring in rings] == [[32], [32], [32]]


def test_the_cascade_is_drawn_beside_single_sizes():
    cascades = [CascadePoint(16, 0.7, 9.0, 36.0, 3.0), CascadePoint(32, 0.8, 12.0, 48.0, 4.0)]
    alone = [CascadePoint(8, 0.6, 8.0, 32.0, 1.0), CascadePoint(32, 0.8, 32.0, 128.0, 2.0)]
    noise = [alone[0], CascadePoint(16, 0.7, 16.0, 64.0, 3.0), alone[1]]
    assert len(cascade_in_use(cascades, noise, 32, "digits").axes) == 1, "times that do not grow"
    figure = cascade_in_use(cascades, alone, 32, "digits")
    by_bytes, by_time = figure.axes
    assert lines(by_bytes)["cascade, by its largest size"] == ([36, 48], [70, 80])
    assert lines(by_time)["one size"] == ([1, 2], [60, 80])
    assert "up to 32 dims allowed, 12.0 used on average, 80.00% right" in figure.get_suptitle().replace("\n", " ")


def test_a_slider_redraws_at_its_value(monkeypatch):
    pytest.importorskip("ipywidgets")
    shown, updates = [], []
    handle = SimpleNamespace(update=updates.append)
    monkeypatch.setattr("IPython.display.display", lambda what, display_id=None: shown.append(what) or handle)
    size_slider("picture of {}".format, [8, 16, 32], start=16)
    picture, slider = shown
    slider.value = 32
    assert picture == "picture of 16" and updates == ["picture of 32"]


def test_blocks_maps_and_cosines_are_drawn_as_given():
    found = Blocks((8, 16), np.array([2.0, 0.5]), np.array([0.9, 0.4]), np.array([3.0, 4.0]))
    figure = block_statistics({f"a_run_of_mine_with_a_long_name_{i}": found for i in range(4)})
    assert len({line.get_color() for line in figure.axes[1].lines}) == 4
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    variance, between, rank = block_statistics({"run": found}).axes
    assert lines(variance)["run"] == ([8, 16], [2, 0.5])
    percent, directions = (axes.lines[0].get_ydata() for axes in (between, rank))
    assert (list(percent), list(directions)) == ([90, 40], [3, 4])

    places, labels = np.array([[0.0, 0], [2, 0], [5, 5]]), np.array([0, 0, 1])
    [axes] = prefix_maps({8: places}, labels, ["x", "y"]).axes
    assert [text.get_text() for text in axes.texts] == ["x", "y"] and axes.texts[0].xy == (1, 0)
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 3

    labels = np.repeat(np.arange(25), [*range(1, 26)])
    figure = prefix_maps({8: np.zeros((len(labels), 2))}, labels, [f"group {i}" for i in range(26)], "digits")
    colors = {tuple(dots.get_facecolors()[0]) for dots in figure.axes[0].collections[1:]}
    assert len(colors) == 20 == len(figure.legends[0].get_texts())
    assert "colored: the 20 of 25 with the most images" in figure.get_suptitle().replace("\n", " ")

    [axes] = cosine_distributions({8: (np.array([0.9, 1.0]), np.array([-0.5, 0.5]))}).axes
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(200)  # each kind 100%
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0.95, 0])
    assert axes.get_xlim()[0] < -1
    [axes] = cosine_distributions({8: (np.array([0.9]), np.array([0.1]))}).axes
    assert axes.get_xlim()[0] > -0.1


def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    name, photo = "from $5_to_$10", torch.zeros(3, 8, 8)
    neighbors = neighbor_grid(photo, {8: [(photo, name)]}, name, name)
    pairs = confusions(np.ones((1, 2, 2), int), [8], [8], [name, "b"], name)
    for figure in (neighbors, pairs):
        assert all(path.stat().st_size for path in save(figure, tmp_path / "drawn")), "formulas that are none end it"
        shown = [text for text in figure.findobj(Text) if "$5" in text.get_text()]
        assert len(shown) >= 2 and not any(text.get_parse_math() for text in shown)
