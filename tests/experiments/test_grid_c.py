"""The grid on a pretrained network takes the learning rates that its sweep found."""

from experiments.learning_rates import best_rates
from experiments.reproduce import REPOSITORY, plan, read_grid
from mrl.results import method_name


def test_every_run_of_grid_c_has_the_best_rate_of_the_committed_sweep(tmp_path):
    best = best_rates(REPOSITORY / "results/tiny_imagenet/lite0_last_layer/learning_rates.csv")
    for run in plan(read_grid("c"), tmp_path, None):
        dims, tied = run.config.head.nesting_list, run.config.head.tied
        dim = dims[0] if len(dims) == 1 else 0
        assert run.config.optim.lr == best[method_name(dims, tied), dim], run.name
