import json
import os
import signal
import time

import pytest
import torch

from mrl.config import WandbConfig
from mrl.errors import UserError
from mrl.training import logging
from mrl.training.logging import MetricAccumulator, StopSignals, Tracker


def test_means_are_over_images_not_over_batches_and_per_prefix():
    """Batches of 3 and 1 images: a mean of batch means would give 0.5 for prefix 8, not 0.25."""
    sums = MetricAccumulator([8, 16], torch.device("cpu"))
    logits = torch.eye(2)[torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])]  # prefix 8 predicts class 0, prefix 16 is right
    sums.add(logits[:, :3], torch.tensor([1, 1, 1]), torch.tensor([2.0, 1.0]))
    sums.add(logits[:, 3:], torch.tensor([0]), torch.tensor([6.0, 1.0]))
    assert sums.means("loss", "top_1") == {"loss/8": 3.0, "loss/16": 1.0, "top_1/8": 0.25, "top_1/16": 1.0}


def test_the_first_step_with_a_non_finite_loss_is_named_with_its_prefixes():
    sums, logits, labels = MetricAccumulator([8, 16, 32], torch.device("cpu")), torch.zeros(3, 4, 2), torch.zeros(4)
    sums.add(logits, labels, torch.tensor([1.0, 2.0, 3.0]))
    sums.check_finite(8, batch_size=4)
    for losses in ([1.0, float("nan"), float("inf")], [float("nan")] * 3):
        sums.add(logits, labels, torch.tensor(losses))
    with pytest.raises(UserError, match=r"the loss at step 8 is not finite for prefix sizes \[16, 32\]"):
        sums.check_finite(10, batch_size=4)


def test_rows_after_the_checkpoint_are_dropped_and_non_finite_numbers_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    with Tracker(tmp_path, True, start_step=2, total_steps=5, batch_size=1) as tracker:
        tracker.log({"step": 3, "loss/8": float("nan")})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss/8": null}\n'


def test_other_processes_write_nothing(tmp_path, capsys):
    with Tracker(tmp_path, False, 0, 5, 1) as tracker:
        tracker.log({"step": 1}, "status")
        tracker.advance()
        tracker.log_line("hello")
        tracker.start_wandb(WandbConfig("offline"), "a", {})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_stop_signals_are_kept_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as received:
        assert not received
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert received and received.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_only_a_wait_gets_an_end_and_only_after_a_signal(monkeypatch):
    timers, limit = [], logging.SECONDS_TO_WAIT
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: timers.append(seconds))
    with StopSignals() as received:
        with received.waiting():
            pass  # without a signal
        os.kill(os.getpid(), signal.SIGTERM)  # in a step
        with received.waiting():
            pass
    with StopSignals() as received, received.waiting():
        os.kill(os.getpid(), signal.SIGTERM)  # in a wait
    assert [seconds for seconds in timers if seconds] == [limit, limit] and timers[-1] == 0


def test_a_wait_that_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(logging, "SECONDS_TO_WAIT", 0.1)
    with StopSignals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as raised, received.waiting():
            time.sleep(20)
    assert raised.value.args == (signal.SIGTERM,)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
