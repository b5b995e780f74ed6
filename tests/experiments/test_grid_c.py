"""The grid on a pretrained network takes the learning rates that its sweep found."""

from experiments.learning_rates import best_rates
from experiments.reproduce import REPOSITORY, plan, read_grid
from mrl.results import method_name


def test_every_run_of_grid_c_has_the_best_rate_of_the_committed_sweep(tmp_path):
    best = best_rates(REPOSITORY / "results/tiny_imagenet/lite0_last_layer/learning_rates.csv")
    for run in plan(read_grid("c"), tmp_path, None):
        head, lr = run.config.head, run.config.optim.lr
        if head.weights:  # a rate of its own for each prefix
            rates = {dim: lr * weight for dim, weight in zip(head.nesting_list, head.weights, strict=True)}
            assert {("FF", dim): round(rate, 9) for dim, rate in rates.items()}.items() <= best.items()
        else:
            dim = head.nesting_list[0] if len(head.nesting_list) == 1 else 0
            assert lr == best[method_name(head.nesting_list, head.tied), dim], run.name
