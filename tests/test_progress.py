"""Progress bars where nobody watches them move: in a log file."""

import io
import re
import sys

import pytest
from tqdm import tqdm

from mrl import progress as module
from mrl.progress import progress


def log_to(monkeypatch, seconds):
    """Make stderr a file that a line is due in every so many seconds; pytest would undo that after a fixture."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", seconds)
    return file


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_holds_whole_lines(monkeypatch, leave):
    log = log_to(monkeypatch, 0)
    with progress(total=3, desc="embed", unit="image", delay=0, leave=leave) as bar:
        for _ in range(3):
            bar.update()
            tqdm.write("said", file=log)
    text = log.getvalue()
    assert "\r" not in text and "\n\n" not in text and text.endswith("\n")
    assert re.findall(r" (\d)\.00/3\.00 \[.*\n", text) == ["0", "1", "2", "3"]
    assert text.count("said\n") == 3


def test_the_last_line_tells_where_a_bar_ended(monkeypatch):
    log = log_to(monkeypatch, 1000)
    with progress(total=9, delay=0) as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
            tqdm.write("said", file=log)
    assert re.findall(r" (\d)\.00/9\.00 \[.*\n", log.getvalue()) == ["0", "4"]


def test_what_takes_no_two_seconds_writes_nothing(monkeypatch):
    log = log_to(monkeypatch, 0)
    assert list(progress(range(3))) == [0, 1, 2]
    assert list(progress(range(3), show=False, delay=0)) == [0, 1, 2]  # nor what is not to be shown
    assert log.getvalue() == ""


def test_a_terminal_gets_a_line_that_moves(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress(range(3), delay=0, mininterval=0):
        pass
    assert terminal.getvalue().count("\r") >= 3
