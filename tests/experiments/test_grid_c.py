"""The grids on a pretrained network take the learning rates that their sweeps found."""

import dataclasses

import pandas as pd
import pytest

from experiments.reproduce import REPOSITORY, plan, read_grid
from mrl.config import parse_command_line
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
        elif not head.self_distillation:
            dim = head.nesting_list[0] if len(head.nesting_list) == 1 else 0
            assert lr == best[method_name(head.nesting_list, head), dim], run.name


def test_self_distillation_has_the_largest_weight_that_costs_no_size_half_a_point(tmp_path):
    folder = REPOSITORY / "results/tiny_imagenet/lite0_projection"
    sweep, variants = (pd.read_csv(folder / f"{name}.csv") for name in ("learning_rates", "variants"))
    best = best_rates(folder / "learning_rates.csv")
    runs = [run for run in plan(read_grid("c_projection"), tmp_path, None) if run.config.head.self_distillation]
    assert len(runs) == 6
    for run in runs:
        head, method = run.config.head, "MRL-E" if run.config.head.tied else "MRL"
        plain = sweep[(sweep.method == method) & (sweep.lr == best[method, 0])].set_index("dim").top_1
        tried = variants[variants.name.str.fullmatch(r"(mrl_e_)?distilled_[\d.]+") & (variants.seed == 0)]
        tried = tried[tried.method == f"{method} distilled"]
        cost = {
            float(name.rpartition("_")[2]): (plain - of_weight.set_index("dim").top_1).max()
            for (name, lr), of_weight in tried.groupby(["name", "lr"])
            if lr == run.config.optim.lr
        }
        assert head.self_distillation == max(weight for weight, most in cost.items() if most <= 0.005)


def test_the_recipe_that_was_best_is_a_run_of_the_grid(tmp_path):
    [run] = [run for run in plan(read_grid("c_projection"), tmp_path, None) if run.name == "lite0p_mrl_distilled_seed0"]
    recipe = parse_command_line(["--config", "tiny_imagenet_lite0_distilled"], "")
    assert dataclasses.replace(recipe, run=run.config.run) == run.config
