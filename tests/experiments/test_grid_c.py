"""Grids can be planned, and take the learning rates that their sweeps found."""

import dataclasses
import functools
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch

from experiments.lite0_weights import convert
from experiments.reproduce import GRIDS, REPOSITORY, plan, read_grid
from mrl.config import parse_command_line
from mrl.errors import UserError
from mrl.results import method_name

planned = functools.cache(lambda name: plan(read_grid(name), Path("runs"), None))


@pytest.mark.parametrize("name", sorted(path.stem for path in GRIDS.glob("*.yaml")))
def test_every_shipped_grid_can_be_planned(name):
    assert len({run.name for run in planned(name)}) == len(planned(name)) > 0


def best_rates(path):
    """Return ``{(method, dim): learning rate}`` of the best mean over seeds; nested methods have one, of all dims."""
    frame = pd.read_csv(path)
    nested = frame["method"] != "FF"
    frame.loc[nested, "dim"] = 0
    mean = frame.groupby(["method", "dim", "lr"])["top_1"].mean()
    return {(method, int(dim)): some.idxmax()[2] for (method, dim), some in mean.groupby(level=[0, 1])}


@pytest.mark.parametrize(
    ("grid", "group"),
    [("c", "lite0_last_layer"), ("c_projection", "lite0_projection"), ("d", "lite0_end_to_end")],
)
def test_every_run_of_grids_c_and_d_has_the_best_rate_of_the_committed_sweep(grid, group):
    best = best_rates(REPOSITORY / "results/tiny_imagenet" / group / "learning_rates.csv")
    for run in planned(grid):
        head, lr = run.config.head, run.config.optim.lr
        if head.weights:  # a rate of its own for each prefix
            rates = {dim: lr * weight for dim, weight in zip(head.nesting_list, head.weights, strict=True)}
            assert {("FF", dim): round(rate, 9) for dim, rate in rates.items()}.items() <= best.items()
        elif not head.self_distillation:
            dim = head.nesting_list[0] if len(head.nesting_list) == 1 else 0
            assert lr == best[method_name(head.nesting_list, head), dim], run.name


def test_nested_runs_of_grid_b_have_the_best_rate_and_ff_one_within_a_point_of_it():
    path = REPOSITORY / "results/tiny_imagenet/resnet14t_100_classes/learning_rates.csv"
    best, swept = best_rates(path), pd.read_csv(path).set_index(["method", "dim", "lr"]).top_1
    for run in planned("b"):
        head, lr = run.config.head, run.config.optim.lr
        method = method_name(head.nesting_list, head)
        if method != "FF":
            assert lr == best[method, 0]
        elif ("FF", dim := head.nesting_list[0]) in best:
            assert swept["FF", dim, lr] > swept["FF", dim].max() - 0.01


def test_self_distillation_has_the_largest_weight_that_costs_no_size_half_a_point():
    folder = REPOSITORY / "results/tiny_imagenet/lite0_projection"
    sweep, variants = (pd.read_csv(folder / f"{name}.csv") for name in ("learning_rates", "variants"))
    best = best_rates(folder / "learning_rates.csv")
    runs = [run for run in planned("c_projection") if run.config.head.self_distillation]
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


def test_the_recipe_that_was_best_is_a_run_of_the_grid():
    [run] = [run for run in planned("c_projection") if run.name == "lite0p_mrl_distilled_seed0"]
    recipe = parse_command_line(["--config", "tiny_imagenet_lite0_distilled"], "")
    assert dataclasses.replace(recipe, run=run.config.run) == run.config


def test_entries_in_timms_order_get_timms_names_and_others_are_refused(tmp_path):
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({str(i): value for i, value in enumerate(expected.values())}, tmp_path / "w.pth")
    found = convert(tmp_path / "w.pth")
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    torch.save({str(i): value for i, value in enumerate(reversed(expected.values()))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not hold the 296 entries"):
        convert(tmp_path / "w.pth")
