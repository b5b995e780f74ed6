"""Figures 2 and 3 of the paper: accuracy against embedding size; and the panels of all figures by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrl.figures.style import (
    PAPER,
    add_legend,
    counts,
    dataset_of,
    dim_axis,
    draw_line,
    draw_paper,
    line_labels,
    line_styles,
    metric_label,
    seeds_note,
    title,
    values_by_dim,
)
from mrl.paper import paper_rows
from mrl.results import METHODS, Row

NESTED = ("MRL", "MRL-E")


def accuracy_by_dim(rows: Sequence[Row], metric: str = "top_1") -> Figure:
    """Accuracy against embedding size (figures 2 and 3 of the paper), a panel for linear classification and 1-NN each.

    One line per method; fixed-feature models of several sizes join into one. Where a method was
    trained with several seeds the line is their mean and the bars one standard deviation. Runs that
    share method, size and seed are different models: those of such a method get a line each. Sizes
    between the trained ones and the baselines have figures of their own.

    Args:
        rows: Of one dataset; those of classification tell which sizes of a nested model were trained.
        metric: "top_1" or "top_5".

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    trained = trained_dims(rows)
    shown = [row for row in rows if row.method in METHODS and is_trained(row, trained)]
    panels = {("classification", metric): "linear classification", ("retrieval", metric): "1-nearest neighbor"}
    return panels_by_dim(shown, panels)


def trained_dims(rows: Sequence[Row]) -> dict[tuple[str, str], set[int]]:
    """``{(method, run): sizes}`` that nested models were trained at: those that have a classifier."""
    trained: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if row.study == "classification" and row.method in NESTED and row.dim is not None:
            trained.setdefault((row.method, row.run), set()).add(row.dim)
    return trained


def is_trained(row: Row, trained: Mapping[tuple[str, str], set[int]]) -> bool:
    """Whether the size of ``row`` is not known to lie between the trained sizes of a nested model."""
    return row.dim in trained.get((row.method, row.run), {row.dim})


def panels_by_dim(rows: Sequence[Row], panels: Mapping[tuple[str, str], str], *, filled: bool = False) -> Figure:
    """A panel of lines by size for each ``(study, metric)`` of ``panels`` that has rows, under its title.

    On ImageNet the paper's values of the same methods are dashed: at its trained sizes, and where ours are ``filled``,
    to stand beside sizes that were never trained, at such sizes too.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if (row.study, row.metric) in panels and row.dim is not None]
    check_one_dataset(rows, sorted({metric for _, metric in panels}))
    labels = line_labels(rows)
    styles = line_styles(labels)
    shown = [key for key in panels if any((row.study, row.metric) == key for row in rows)]
    figure = Figure(figsize=(4.6 * len(shown) + 0.4, 4.2 if len(styles) <= 4 else 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (study, metric) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        of_panel = [row for row in rows if (row.study, row.metric) == (study, metric)]
        lines = values_by_dim(of_panel, labels)
        for label in [label for label in styles if label in lines]:
            fill = {"markerfacecolor": styles[label]["color"]} if filled else {}
            draw_line(axes, lines[label], label, styles[label] | fill)
        for method, points in _published(rows[0].dataset, study, metric, between=filled).items():
            ours = [label for (of, _), label in labels.items() if of == method and label in lines]
            if ours:
                draw_paper(axes, points, method, styles[ours[0]])
        dim_axis(axes, sorted({row.dim for row in of_panel if row.dim is not None}))
        axes.set_title(panels[study, metric], fontsize=10)
        axes.set_ylabel(metric_label(metric))
    title(figure, f"{rows[0].dataset}: {counts(rows)} images{seeds_note(rows, labels)}")
    add_legend(figure, [*styles, *(PAPER.format(method) for method, _ in labels)])
    return figure


def _published(dataset: str, study: str, metric: str, *, between: bool) -> dict[str, list[tuple[float, float]]]:
    """``{method: [(dim, percent)]}`` of the paper, also at sizes ``between`` those it trained; none of other data."""
    found: dict[str, list[tuple[float, float]]] = {}
    rows = paper_rows(dataset)
    trained = trained_dims(rows)
    for row in rows:
        if (row.study, row.metric) == (study, metric) and row.dim is not None and (between or is_trained(row, trained)):
            found.setdefault(row.method, []).append((row.dim, 100 * row.value))
    return found


def check_one_dataset(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Nothing, once there are rows and all are of one dataset.

    Raises:
        UserError: They are not.
    """
    dataset_of(rows, f"metric {' or '.join(map(repr, metrics))}")


def robustness_by_dim(rows: Sequence[Row]) -> Figure:
    """Accuracy on further images of the trained classes against embedding size (table 17 of the paper).

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    return panels_by_dim(rows, {("robustness", "top_1"): "images of other origin, trained classes"})


def few_shot_by_dim(rows: Sequence[Row]) -> Figure:
    """Accuracy of the nearest class mean against embedding size (table 15 of the paper), a panel for 1, 5 and 9 shots.

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    return panels_by_dim(rows, {("few_shot", f"top_1_{n}_shot"): f"nearest class mean, {n}-shot" for n in (1, 5, 9)})
