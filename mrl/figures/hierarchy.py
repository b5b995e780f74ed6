"""Figures 11 and 12 of the paper: accuracy within each superclass and of single classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.results import Row, data_title, span

COLUMNS = 5
METHOD_COLUMNS = 3
LOSER = "the class that the largest size costs most"


@rc_context(style.RC)
def accuracy_within_superclasses(rows: Sequence[Row]) -> Figure:
    """Draw how well the classes of each superclass are told apart (figure 11), those that gain most with size first."""
    rows = [row for row in rows if (row.study, row.metric) == ("hierarchy", "top_1_within")]
    table = style.table_of(rows, "accuracy within superclasses")
    styles = {label: look | {"markersize": 4, "linewidth": 1.2} for label, look in style.styles_of(table).items()}
    first = table.method.iloc[0]
    accuracy = table[table.method == first].pivot_table("percent", "group", "dim")
    gains = accuracy.iloc[:, 0] - accuracy.iloc[:, -1]
    groups = sorted(table.groupby("group"), key=lambda item: (gains[item[0]], item[0]))
    figure, all_axes = style.panels(len(groups), COLUMNS, (2.3, 1.9), sharex=True, sharey=True)
    for i, (axes, (name, of_group)) in enumerate(zip(all_axes, groups, strict=True)):
        style.draw_lines(axes, of_group, styles)
        axes.set_title(f"{name.replace('_', ' ')} (n = {span(of_group.n)})", fontsize=8)
        axes.set_ylabel("top-1 (%)" if i % COLUMNS == 0 else "", fontsize=8)
    for i, axes in enumerate(all_axes):
        lowest = i + COLUMNS >= len(groups)
        style.dim_axis(axes, table.dim)
        axes.set_xlabel("size (dims)" if lowest else "", fontsize=8)
        axes.tick_params(labelsize=7, labelbottom=lowest)
    heading = f"{data_title(rows[0].dataset)}: classes told apart within each superclass, by what {first} gains"
    return style.finish(figure, f"{heading} with size{style.bars_note(table)}", styles)


@rc_context(style.RC)
def class_accuracy_against_full_width(rows: Sequence[Row]) -> Figure:
    """Draw accuracy of each class at each size minus at the largest, in points (figure 12), a panel per nested method.

    A dot per class, the mean over runs; the line is their median, the band their middle half. Crosses mark
    the class that the largest size costs most.
    """
    rows = [row for row in rows if (row.study, row.metric) == ("per_class", "top_1") and row.method.startswith("MRL")]
    table = style.table_of(rows, "single classes of nested models")
    styles = style.styles_of(table)
    lines = list(table.groupby("label", sort=False))
    figure, all_axes = style.panels(len(lines), METHOD_COLUMNS, (4.6, 4.2), sharey=True)
    for axes, (label, of_label) in zip(all_axes, lines, strict=True):
        accuracy = of_label.pivot_table("percent", "group", "dim").dropna()
        _draw_classes(axes, accuracy.sub(accuracy.iloc[:, -1], axis=0), styles[label]["color"])
        axes.set_title(label)
    limits = all_axes[0].get_ylim()
    for i, (axes, (_, of_label)) in enumerate(zip(all_axes, lines, strict=True)):
        style.dim_axis(axes, of_label.dim)
        axes.set_ylabel("" if i % METHOD_COLUMNS else "class accuracy minus that at full size (points)", fontsize=9)
    all_axes[0].set_ylim(limits)  # differences go below 0
    seeds = table.groupby("label").seed.nunique().max()
    means = f"; means of up to {seeds} seeds" if seeds > 1 else ""
    heading = f"{data_title(table.dataset[0])}: {table.group.nunique():,} classes of {span(table.n)}"
    return style.finish(figure, f"{heading} validation images each{means}; line: median, band: middle half", [LOSER])


def _draw_classes(axes: Axes, points: pd.DataFrame, color: str) -> None:
    """Draw differences (C classes, G sizes) as dots, their quartiles, and the class that loses most."""
    dims = points.columns.to_numpy()
    spots = dims * 2 ** np.random.default_rng(0).uniform(-0.22, 0.22, points.shape)
    size = min(14.0, max(2.0, 1500 / len(points)))
    axes.scatter(spots[:, :-1], points.to_numpy()[:, :-1], size, color=color, alpha=0.35, linewidths=0)
    low, middle, high = points.quantile([0.25, 0.5, 0.75]).to_numpy()
    axes.fill_between(dims, low, high, color="0.75", alpha=0.6, linewidth=0, zorder=1)
    axes.plot(dims, middle, color="black", linewidth=1.4)
    loser = points.iloc[:, 0].idxmax()
    if (loss := points.loc[loser]).iloc[0] > 0:
        axes.plot(dims, loss, color="black", linewidth=0.8, linestyle=":", marker="x", markersize=6, label=LOSER)
        style.annotate(axes, loser, (dims[0], loss.iloc[0]), (4, 6), fontsize=8)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
