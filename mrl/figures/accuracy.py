"""Figures 2 and 3 of the paper: accuracy against embedding size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrl.errors import UserError
from mrl.figures.style import (
    METRIC_LABELS,
    add_legend,
    counts,
    dim_axis,
    draw_line,
    line_labels,
    line_styles,
    seeds_note,
    values_by_dim,
)
from mrl.results import Row

PANELS = {"classification": "linear classification", "retrieval": "1-nearest neighbour"}


def accuracy_by_dim(rows: Sequence[Row], metric: str = "top_1") -> Figure:
    """Accuracy against embedding size (figures 2 and 3 of the paper), a panel for linear classification and 1-NN each.

    One line per method; fixed-feature models of several sizes join into one. Where a method was
    trained with several seeds the line is their mean and the bars one standard deviation. Runs that
    share method, size and seed are different models: those of such a method get a line each.

    Args:
        rows: Of one dataset.
        metric: "top_1" or "top_5".

    Raises:
        UserError: There is nothing to draw, or the rows are of several datasets.
    """
    rows = [row for row in rows if row.metric == metric and row.study in PANELS and row.dim is not None]
    datasets = sorted({row.dataset for row in rows})
    if len(datasets) != 1:
        found = f"rows of several datasets: {datasets}" if datasets else f"no rows with metric {metric!r}"
        raise UserError(f"one figure shows one dataset, but was given {found}")
    labels = line_labels(rows)
    panels = [study for study in PANELS if any(row.study == study for row in rows)]
    styles = line_styles(labels)
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, study in zip(all_axes, panels, strict=True):
        of_study = [row for row in rows if row.study == study]
        lines = values_by_dim(of_study, labels)
        for label in [label for label in styles if label in lines]:
            draw_line(axes, lines[label], label, styles[label])
        dim_axis(axes, sorted({row.dim for row in of_study if row.dim is not None}))
        axes.set_title(PANELS[study], fontsize=10)
        axes.set_ylabel(METRIC_LABELS.get(metric, f"{metric} (%)"))
    figure.suptitle(f"{datasets[0]}: {counts(rows)} validation images{seeds_note(rows, labels)}", fontsize=11)
    add_legend(figure, list(styles))
    return figure
