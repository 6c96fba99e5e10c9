"""The line of progress: what it shows, and that the time it says is left comes true."""

import re
import sys
import time

import pytest

from jlora.training.metrics import ProgressLine, clock


@pytest.fixture
def now(monkeypatch):
    """A clock of our own, in a list."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def figures(step, total):
    return {"epoch": step / total, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1234.0}


def run(now, total, step_seconds, evaluation, every, start=0):
    """A run with a compilation of 60 s; step -> (when, text that was shown)."""
    line, shown = ProgressLine(total, start, False, every), {}
    line.say = lambda text: shown.update({len(shown): (now[0], text)})
    if evaluation and not start:  # the first compiles, and is measured without that
        now[0] += 30.0 + evaluation
        line.evaluated(30.0 + evaluation, evaluation)
    now[0] += 60.0
    for step in range(start + 1, total + 1):
        now[0] += step_seconds
        line.update(step, figures(step, total))
        if evaluation and (step == total or (every and step % every == 0)):
            now[0] += evaluation
            line.evaluated(evaluation, evaluation)
    return [(at, text) for at, text in shown.values()], now[0]


def seconds(text):
    found = re.search(r", ([\d:]+) left", text)
    return sum(int(part) * 60**power for power, part in enumerate(reversed(found[1].split(":")))) if found else None


@pytest.mark.parametrize(
    ("total", "step_seconds", "evaluation", "every", "start"),
    [
        (40, 12.0, 90.0, 10, 0),
        (40, 12.0, 0.0, None, 0),
        (33, 11.0, 45.0, 8, 0),
        (200, 10.5, 300.0, 50, 0),
        (60, 15.0, 0.0, None, 30),
        (40, 12.0, 90.0, None, 0),
    ],
)
def test_time_left_comes_true_from_the_third_step_on(now, total, step_seconds, evaluation, every, start):
    lines, end = run(now, total, step_seconds, evaluation, every, start)
    assert len(lines) == total - start and "left" not in lines[0][1]
    for at, text in lines[2:]:
        truth = end - at
        assert abs(seconds(text) - truth) <= max(0.2 * truth, 1.0), text


def test_a_line_says_where_the_run_is(now, capsys):
    line = ProgressLine(120, 0, False)
    for step, at in ((1, 1030.0), (2, 1040.0), (21, 1230.0)):
        now[0] = at
        line.update(step, figures(step, 120))
    *_, last = capsys.readouterr().err.splitlines()
    words = "step 21/120  epoch 0.17  loss 2.0000  lr 1.0e-04  grad 0.5  1,234 tokens/s  3:50, 16:30 left"
    assert last == words


def test_quiet_is_quiet(now, capsys):
    line = ProgressLine(2, 0, True)
    line.update(1, figures(1, 2))
    line.say("x")
    line.close()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_lines_stay_above_a_bar_of_80_columns(monkeypatch):
    written = []

    class Terminal:
        encoding, columns = "utf-8", 80

        def isatty(self):
            return True

        def write(self, text):
            written.append(text)

        def flush(self):
            pass

        def fileno(self):
            return 2

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    line = ProgressLine(1000, 0, False)
    for step in range(1, 101):
        line.update(step, figures(step, 1000))
    line.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(written))
    assert "step 50/1000  epoch 0.05" in text and "step 100/1000  epoch 0.10" in text
    bars = [part for part in re.split(r"[\r\n]+", text) if "━" in part]
    assert bars and all(len(bar.rstrip()) <= 80 for bar in bars), bars[-1]


@pytest.mark.parametrize(("given", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (101, "1:41"), (5000, "1:23:20")])
def test_seconds_as_a_clock(given, shown):
    assert clock(given) == shown
