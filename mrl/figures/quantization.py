"""Accuracy by bytes per vector: the best codes and dims of each method, as a figure and as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.results import Row
from mrl.studies.quantization import METRICS, STUDY, pareto_front

MARKERS = {"float32": "o", "float16": "D", "int8": "s", "4 bits": "^", "RaBitQ, 4 bits": "P", "RaBitQ, 1 bit": "X"}
MARKERS |= {"sign bits": "v"}
BYTES = "bytes per vector that the search reads"
CURVE = "float32 alone, by dim (pale)"
PASSES = {False: "one pass", True: "with a second pass in float16 (on disk, not counted)"}
SHARES = (0.9, 0.95, 0.98, 0.99, 1.0)


def _mean_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return a line per label, metric, dim and code: its bytes, and the mean and std over seeds in percent."""
    table = table.assign(second_pass=table.shortlist_size.notna())
    point = ["label", "metric", "dim", "code", "second_pass", "shortlist_size", "bytes"]
    grouped = table.groupby(point, dropna=False, sort=False)
    return grouped.agg(percent=("percent", "mean"), std=("percent", "std"), runs=("run", "nunique")).reset_index()


@rc_context(style.RC)
def accuracy_by_bytes(rows: Sequence[Row]) -> Figure:
    """Draw the Pareto front of each method over all codes and dims, and in pale its curve in float32.

    The panels above show codes alone; below, codes with a second pass can be part of the front too.
    """
    table = style.table_of([row for row in rows if row.study == STUDY], STUDY)
    points, styles = _mean_points(table), style.styles_of(table)
    passes = [False, True] if points.second_pass.any() else [False]
    drawn: set[str] = set()
    metrics = [metric for metric in METRICS if metric in set(points.metric)]
    figure, all_axes = style.panels(len(passes) * len(metrics), len(metrics), (4.6, 3.4), sharey="col")
    panels = np.reshape(all_axes, (len(passes), len(metrics)))
    for second_pass, of_pass in zip(passes, panels, strict=True):
        for metric, axes in zip(metrics, of_pass, strict=True):
            for label, look in styles.items():
                own = points[(points.metric == metric) & (points.label == label) & (points.second_pass <= second_pass)]
                curve, front = own[own.code == "float32"].sort_values("bytes"), pareto_front(own)
                line = {"color": look["color"], "linestyle": look["linestyle"]}
                axes.plot(curve.bytes, curve.percent, **line | {"alpha": 0.5, "linewidth": 1})
                bars = front["std"].fillna(0) if (front.runs > 1).any() else None
                axes.errorbar(front.bytes, front.percent, bars, label=label, elinewidth=1, **line)
                drawn |= set(front.code)
                for code, of_code in front.groupby("code"):
                    axes.plot(of_code.bytes, of_code.percent, MARKERS[code], color=look["color"])
            style.dim_axis(axes, points.bytes[points.code.isin(["float32", "sign bits"])])
            axes.set(title=PASSES[second_pass], ylabel=style.metric_label(metric), xlabel=BYTES)
    codes = [code for code in MARKERS if code in drawn]
    for code in codes:
        panels[0][0].plot([], [], MARKERS[code], color="0.3", label=code)
    panels[0][0].plot([], [], color="0.3", alpha=0.5, linewidth=1, label=CURVE)
    return style.finish(figure, style.heading(table, "queries, best codes and dims"), [*styles, CURVE, *codes])


def bytes_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a head and a line per method and kind of code: the fewest bytes per vector for shares of full accuracy.

    Full accuracy is the highest of all methods in float32 at their largest dim. A cell is "bytes (dim x code)", or "-"
    if nothing gives as much. [] if there are no rows.
    """
    coded = [row for row in rows if row.study == STUDY and row.metric == "top_1"]
    if not coded:
        return []
    points = _mean_points(style.table_of(coded, STUDY))
    largest = points[points.code == "float32"].sort_values("dim").groupby("label").tail(1)
    full = largest.percent.max()
    lines = [["method", "code", *(f"{share:.0%} of {full:.2f}" for share in SHARES)]]
    for label, own in points.groupby("label", sort=False):
        kinds = {"float32": own.code == "float32", "any code": ~own.second_pass, "with second pass": own.bytes > 0}
        for kind, of_kind in ((kind, own[chosen]) for kind, chosen in kinds.items()):
            front = pareto_front(of_kind)
            lines.append([str(label), kind, *(_cell(front[front.percent >= share * full]) for share in SHARES)])
    return lines


def _cell(enough: pd.DataFrame) -> str:
    if enough.empty:
        return "-"
    first = enough.iloc[0]
    length = f", best {first.shortlist_size:.0f}" if first.second_pass else ""
    return f"{first.bytes} ({first.dim} x {first.code}{length})"
