"""The grids on a pretrained network take the learning rates that their sweeps found."""

import pandas as pd
import pytest

from experiments.reproduce import REPOSITORY, plan, read_grid
from mrl.results import method_name


def best_rates(path):
    """Return ``{(method, dim): learning rate}`` of the best mean over seeds; nested methods have one, of all dims."""
    frame = pd.read_csv(path)
    nested = frame["method"] != "FF"
    frame.loc[nested, "dim"] = 0
    mean = frame.groupby(["method", "dim", "lr"])["top_1"].mean()
    return {(method, int(dim)): some.idxmax()[2] for (method, dim), some in mean.groupby(level=[0, 1])}


@pytest.mark.parametrize(("grid", "group"), [("c", "lite0_last_layer"), ("c_projection", "lite0_projection")])
def test_every_run_of_grid_c_has_the_best_rate_of_the_committed_sweep(grid, group, tmp_path):
    best = best_rates(REPOSITORY / "results/tiny_imagenet" / group / "learning_rates.csv")
    for run in plan(read_grid(grid), tmp_path, None):
        head, lr = run.config.head, run.config.optim.lr
        if head.weights:  # a rate of its own for each prefix
            rates = {dim: lr * weight for dim, weight in zip(head.nesting_list, head.weights, strict=True)}
            assert {("FF", dim): round(rate, 9) for dim, rate in rates.items()}.items() <= best.items()
        else:
            dim = head.nesting_list[0] if len(head.nesting_list) == 1 else 0
            assert lr == best[method_name(head.nesting_list, head.tied), dim], run.name
