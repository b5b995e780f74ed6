import io
import re
import sys

import pytest
from tqdm import tqdm

from mrl import progress as module
from mrl.progress import progress


def log_to(monkeypatch, seconds):
    """Make stderr a file with a line every ``seconds``; not a fixture, because pytest replaces stderr after those."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", seconds)
    return file


@pytest.mark.parametrize(("seconds", "shown"), [(0, ["0", "1", "2", "3", "3"]), (1000, ["0", "3"])])
def test_a_log_file_gets_whole_lines_now_and_then_and_at_the_end(monkeypatch, seconds, shown):
    log = log_to(monkeypatch, seconds)
    with progress(total=3, desc="embed", unit="image", delay=0) as bar:
        for _ in range(3):
            bar.update()
            tqdm.write("a line", file=log)
            assert list(progress(range(2), desc="inner", leave=False)) == [0, 1]
    text = log.getvalue()
    assert "\r" not in text and "\n\n" not in text and text.endswith("\n")
    assert re.findall(r" (\d)\.00/3\.00 \[.*\n", text) == shown
    assert text.count("a line\n") == 3 and "inner" not in text, "no bar of less than two seconds"


def test_a_terminal_gets_a_line_that_moves(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress(range(3), delay=0, mininterval=0):
        pass
    assert terminal.getvalue().count("\r") >= 3
