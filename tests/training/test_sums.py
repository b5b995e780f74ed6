import pytest
import torch

from mrl.distributed import Process
from mrl.errors import UserError
from mrl.training.logging import FiniteCheck, MetricAccumulator

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


def test_means_are_over_images_not_over_batches():
    """Two batches of 3 and 1 images: a mean of batch means would say 0.5, not 0.25."""
    sums = MetricAccumulator([8], ALONE.device)
    logits = torch.eye(2)[[0, 0, 0, 0]][None]  # always class 0
    sums.add(logits[:, :3], torch.tensor([1, 1, 1]), torch.tensor([2.0]))
    sums.add(logits[:, 3:], torch.tensor([0]), torch.tensor([6.0]))
    assert sums.means("loss", "top_1") == {"loss/8": 3.0, "top_1/8": 0.25}


def test_every_prefix_has_its_own_count():
    sums = MetricAccumulator([8, 16], ALONE.device)
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    sums.add(logits, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert sums.means("loss", "top_1") == {"loss/8": 1.0, "loss/16": 2.0, "top_1/8": 0.5, "top_1/16": 1.0}


def test_the_first_non_finite_step_and_its_prefixes_are_named():
    check = FiniteCheck([8, 16, 32], ALONE)
    check.add(torch.tensor([1.0, 2.0, 3.0]), step=0)
    check.refuse_non_finite()
    check.add(torch.tensor([1.0, float("nan"), float("inf")]), step=4)
    check.add(torch.tensor([float("nan")] * 3), step=5)
    with pytest.raises(UserError, match=r"step 4 is not finite for prefix sizes \[16, 32\]"):
        check.refuse_non_finite()


def test_step_zero_is_named_too():
    check = FiniteCheck([8], ALONE)
    check.add(torch.tensor([float("inf")]), step=0)
    with pytest.raises(UserError, match="step 0"):
        check.refuse_non_finite()
