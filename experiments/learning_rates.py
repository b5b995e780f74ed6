"""A sweep of learning rates: accuracy by rate for each method, scored on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mrl.figures import style
from mrl.results import method_name
from mrl.rundir import atomic_write_text, last_validation

if TYPE_CHECKING:
    from experiments.reproduce import Run

RATES = "learning_rates.csv"


def write_sweep(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write one line per run and dim, a figure, and return their paths."""
    lines = []
    for run in runs:
        scores = last_validation(run.directory)
        about = (run.entry.name, method_name(list(scores), run.config.head), run.config.optim.lr, run.config.run.seed)
        lines += [(*about, dim, top_1) for dim, top_1 in scores.items()]
    frame = pd.DataFrame(lines, columns=["name", "method", "lr", "seed", "dim", "top_1"])
    frame = frame.sort_values(["name", "method", "dim", "lr", "seed"])
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / RATES, frame.to_csv(index=False, float_format="%.5g"))
    draw(frame).savefig(out / "learning_rates.png", dpi=110)
    return [out / RATES, out / "learning_rates.png"]


@rc_context(style.RC)
def draw(frame: pd.DataFrame) -> Figure:
    """Draw top-1 over learning rate at the smallest, a middle, and the largest dim that all methods share."""
    key = "name" if frame.groupby("method")["name"].nunique().max() > 1 else "method"
    looks = style.styles_of(frame.assign(label=frame[key]))
    shared = sorted(set.intersection(*(set(some["dim"]) for _, some in frame.groupby(key))) or set(frame["dim"]))
    dims = sorted({shared[0], shared[len(shared) // 2], shared[-1]})
    figure = Figure(figsize=(3.6 * len(dims), 3.4), layout="constrained")
    for axes, dim in zip(figure.subplots(1, len(dims), squeeze=False)[0], dims, strict=True):
        for label, some in frame[frame["dim"] == dim].groupby(key):
            by_rate = 100 * some.groupby("lr")["top_1"].mean()
            look = looks[str(label)] | {"label": style.METHOD_LABELS.get(str(label), label)}
            axes.plot(by_rate.index, by_rate.to_numpy(), **look)
            axes.plot([by_rate.idxmax()], [by_rate.max()], color=look["color"], marker="*", markersize=13)
        axes.set_xscale("log")
        axes.set_xticks(rates := sorted(frame["lr"].unique()), [f"{rate:g}" for rate in rates], rotation=45)
        axes.set_xticks([], minor=True)
        axes.set(title=f"{dim} dims", xlabel="peak learning rate", ylabel="top-1 (%)", ymargin=0.12)
    figure.suptitle("held-out training images; a star is the best rate", fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
