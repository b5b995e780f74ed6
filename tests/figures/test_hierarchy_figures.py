import numpy as np
import pytest

from mrl.errors import UserError
from mrl.figures import accuracy_within_superclasses, class_accuracy_against_full_width, superclass_accuracy_by_dim
from mrl.results import Source

DIMS = (8, 16, 32)


def rows_of(method, metrics, study="hierarchy", dataset="digits", seed=0):
    """``metrics`` is {metric: one value for each of DIMS}."""
    source = Source(dataset, f"{method}_{seed}", seed, 32, 28, False)
    return [
        source.row(study, method, metric, value, 50, dim=dim)
        for metric, of_dims in metrics.items()
        for dim, value in zip(DIMS, of_dims, strict=True)
    ]


def drawn(axes):
    bars = {c.get_label(): c.lines[0] for c in axes.containers}
    plain = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {label: tuple(map(list, line.get_data())) for label, line in (plain | bars).items()}


def superclass_rows(dataset="digits", reject=True):
    metrics = {"superclass_top_1": (0.7, 0.8, 0.9)}
    if reject:
        metrics["superclass_top_1_with_reject"] = (0.6, 0.65, 0.7)
    return rows_of("MRL", metrics, dataset=dataset) + rows_of("FF", metrics, dataset=dataset)


def test_fault_14_with_and_without_the_reject_class_are_panels_apart():
    first, second = superclass_accuracy_by_dim(superclass_rows()).axes
    np.testing.assert_allclose(drawn(first)["MRL"][1], [70, 80, 90])
    np.testing.assert_allclose(drawn(second)["MRL"][1], [60, 65, 70])
    assert first.get_title() != second.get_title()
    assert len(superclass_accuracy_by_dim(superclass_rows(reject=False)).axes) == 1


def test_the_papers_values_are_31_way_and_drawn_on_imagenet_only():
    first, second = superclass_accuracy_by_dim(superclass_rows("imagenet")).axes
    assert "MRL (paper)" not in drawn(first)
    assert drawn(second)["MRL (paper)"][1][0] == pytest.approx(85.572)
    for axes in superclass_accuracy_by_dim(superclass_rows("tiny_imagenet")).axes:
        assert set(drawn(axes)) == {"MRL", "FF (one model per size)"}


def test_the_title_says_that_the_papers_values_are_of_both_flips():
    note = "ours of one view, the paper's of both flips (inferred)"
    assert note in superclass_accuracy_by_dim(superclass_rows("imagenet")).get_suptitle().replace("\n", " ")
    for rows in (superclass_rows(), superclass_rows("imagenet", reject=False)):
        assert "flips" not in superclass_accuracy_by_dim(rows).get_suptitle()


def test_seeds_are_counted_once_however_many_metrics_there_are():
    rows = superclass_rows() + rows_of("MRL", {"superclass_top_1": (0.5, 0.6, 0.7)}, seed=1)
    assert "1 to 2 seeds" in superclass_accuracy_by_dim(rows).get_suptitle().replace("\n", " ")


def test_a_panel_per_superclass_the_one_that_gains_most_first():
    rows = rows_of("MRL", {"top_1 within dog": (0.8, 0.8, 0.85), "top_1 within a_b": (0.5, 0.6, 0.9)})
    rows += rows_of("FF", {"top_1 within dog": (0.1, 0.8, 0.9), "top_1 within a_b": (0.5, 0.6, 0.6)})
    panels = [axes for axes in accuracy_within_superclasses(rows).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["a b (n = 50)", "dog (n = 50)"]
    np.testing.assert_allclose(drawn(panels[0])["MRL"][1], [50, 60, 90])


def test_superclass_accuracy_of_a_superclass_is_not_mixed_in():
    rows = rows_of("MRL", {"top_1 within dog": (0.8, 0.8, 0.85), "superclass_top_1 in dog": (0.9, 0.9, 0.9)})
    [axes] = accuracy_within_superclasses(rows).axes
    np.testing.assert_allclose(drawn(axes)["MRL"][1], [80, 80, 85])


def test_seven_superclasses_fill_two_lines_and_hide_what_is_left():
    rows = rows_of("MRL", {f"top_1 within s{i}": (0.1 * i, 0.5, 0.9) for i in range(7)})
    all_axes = accuracy_within_superclasses(rows).axes
    assert (len(all_axes), sum(axes.get_visible() for axes in all_axes)) == (10, 7)


def test_classes_are_shown_relative_to_the_largest_size_with_the_one_that_loses():
    classes = {"top_1 of class cat": (0.9, 0.8, 0.7), "top_1 of class dog": (0.5, 0.6, 0.9)}
    [axes] = class_accuracy_against_full_width(rows_of("MRL", classes, study="per_class")).axes
    spots = axes.collections[0].get_offsets()
    np.testing.assert_allclose(sorted(spots[:, 1]), [-40, -30, 10, 20])
    # Dots stand near their own size, not near the next.
    assert set(2.0 ** np.round(np.log2(spots[:, 0]))) == {8, 16}
    assert [text.get_text() for text in axes.texts] == ["cat"]
    low, high = axes.get_ylim()
    assert low < -40 and high > 20


def test_runs_of_a_class_are_averaged():
    rows = [
        row
        for seed, low in ((0, 0.5), (1, 0.7))
        for row in rows_of("MRL", {"top_1 of class cat": (low, 0.8, 0.8)}, study="per_class", seed=seed)
    ]
    [axes] = class_accuracy_against_full_width(rows).axes
    np.testing.assert_allclose(sorted(axes.collections[0].get_offsets()[:, 1]), [-20, 0], atol=1e-9)


@pytest.mark.parametrize(
    "draw", [superclass_accuracy_by_dim, accuracy_within_superclasses, class_accuracy_against_full_width]
)
def test_refuses_rows_with_nothing_to_draw(draw):
    with pytest.raises(UserError, match="one figure shows one dataset, but was given no rows of"):
        draw(rows_of("MRL", {"top_1": (0.1, 0.2, 0.3)}, study="classification"))
