"""Lines by embedding size: figures 2, 3, 5, 7 and 10 of the paper, baselines, robustness and few-shot accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.paper import paper_rows
from mrl.results import Row

LINEAR, NEAREST, RETRIEVAL = ("classification", "top_1"), ("retrieval", "top_1"), ("retrieval", "map@10")
CLASSES = ("hierarchy", "top_1")
PANELS = {
    "accuracy_by_dim": {LINEAR: "linear classification", NEAREST: "1-nearest neighbor"},
    "map_by_dim": {RETRIEVAL: "retrieval"},
    "baselines": {LINEAR: "linear classification", NEAREST: "1-nearest neighbor", RETRIEVAL: "retrieval"},
    "superclasses": {
        ("hierarchy", "superclass_top_1"): "superclasses: images of classes that have one",
        CLASSES: "classes: the same images",
        ("hierarchy", "superclass_top_1_with_reject"): "all images; one more class for the rest",
    },
    "robustness": {("robustness", "top_1"): "images of other origin, trained classes"},
    "few_shot": {("few_shot", f"top_1_{n}_shot"): f"nearest class mean, {n}-shot" for n in (1, 5, 9)},
}
Trained = dict[tuple[str, str], set[int]]


def trained_dims(rows: Sequence[Row]) -> Trained:
    """Return ``{(method, run): sizes}`` that nested models were trained at: those with a classifier."""
    trained: Trained = {}
    for row in rows:
        if row.study == "classification" and row.method.startswith("MRL") and row.dim is not None:
            trained.setdefault((row.method, row.run), set()).add(row.dim)
    return trained


def is_trained(row: Any, trained: Trained) -> bool:
    """Return False if the size of ``row`` is known to lie between the trained sizes of a nested model."""
    return row.dim in trained.get((row.method, row.run), {row.dim})


def by_dim(rows: Sequence[Row], name: str) -> Figure:
    """Draw one of the figures in `PANELS`, at trained sizes; "baselines" shows all methods, the others models only.

    "accuracy_by_dim" has the line of PCA too, the baseline that is hardest to beat.
    """
    trained, panels = trained_dims(rows), PANELS[name]
    if CLASSES in panels:
        rows = [*rows, *class_accuracy(rows)]
    rows = [row for row in rows if (row.study, row.metric.removesuffix("_std")) in panels and row.group is None]
    rows = [row for row in rows if is_trained(row, trained)]
    known = [row for row in rows if style.is_model(row.method)]
    shown = known + [row for row in rows if row.method == "FF PCA"] if name == "accuracy_by_dim" else known
    if name == "baselines" and len(known) == len(rows):
        raise style.NothingToDraw("there are no rows of baselines")
    return _draw(rows if name == "baselines" else shown, panels)


def class_accuracy(rows: Sequence[Row]) -> list[Row]:
    """Return top-1 accuracy of all images that have a superclass, from the rows of each superclass."""
    found: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        if (row.study, row.metric) == CLASSES:
            found.setdefault((row.method, row.run, row.dim), []).append(row)
    totals = [(parts, sum(row.n for row in parts)) for parts in found.values()]
    return [
        replace(parts[0], group=None, n=n, value=sum(row.value * row.n for row in parts) / n) for parts, n in totals
    ]


def interpolation(rows: Sequence[Row]) -> Figure:
    """Draw 1-NN accuracy at sizes that were never trained as hollow markers between the trained ones (figure 5)."""
    trained = trained_dims(rows)
    rows = [row for row in rows if (row.study, row.metric) == NEAREST]
    rows = [row for row in rows if row.method == "FF" or (row.method, row.run) in trained]
    if all(is_trained(row, trained) for row in rows):
        raise style.NothingToDraw("there are no rows at sizes between the trained ones")
    return _draw(rows, {NEAREST: "at trained sizes and between them"}, trained)


@rc_context(style.RC)
def _draw(rows: Sequence[Row], panels: Mapping[tuple[str, str], str], trained: Trained | None = None) -> Figure:
    """Draw lines by size, a panel for each (study, metric) that has rows.

    The paper's values of the same methods and number of images are dashed, at the sizes that it trained. If ``trained``
    is given, markers are filled at its sizes and hollow at the others, and the paper's other sizes are shown too.
    """
    table = style.table_of(rows, " or ".join(panels.values()))
    styles = style.styles_of(table)
    table["between"] = [not is_trained(row, trained or {}) for row in table.itertuples()]
    published, of_paper = style.paper_beside(rows), trained_dims(paper_rows(rows[0].dataset))
    by_panel = dict(list(table.groupby(["study", "metric"])))
    shown = [key for key in panels if key in by_panel]
    figure, all_axes = style.panels(len(shown), len(shown), (4.6, 3.8), sharey=CLASSES in shown)
    for axes, key in zip(all_axes, shown, strict=True):
        at_trained, between = (by_panel[key][by_panel[key].between == flag] for flag in (False, True))
        fill = {label: look | {"markerfacecolor": look["color"]} for label, look in styles.items()}
        style.draw_lines(axes, at_trained, styles if trained is None else fill)
        for label, points in between.groupby("label"):
            style.draw_line(axes, points, "_between", styles[label] | {"linestyle": "none", "markersize": 6})
        for method, [label, *_] in table.groupby("method").label.unique().items():
            points = [
                (row.dim or 0, row)
                for row in published
                if (row.study, row.metric, row.method) == (*key, method) and (trained or is_trained(row, of_paper))
            ]
            style.draw_paper(axes, points, method, styles[label]["color"])
        axes.set(title=panels[key], ylabel=style.metric_label(key[1]))
    for axes in all_axes:
        style.dim_axis(axes, table.dim[~table.between])
    kinds = {"trained size": "0.3", "size between, never trained": "white"} if trained else {}
    for kind, color in kinds.items():
        all_axes[0].plot([], [], "o", color="0.3", markerfacecolor=color, label=kind)
    heading = style.heading(table)
    if any(row.flip for row in published) and not table.flip.any():
        heading += "; the paper's values with flip TTA (inferred), ours without"
    return style.finish(figure, heading, [*styles, *kinds, *map(style.PAPER.format, table.method.unique())])
