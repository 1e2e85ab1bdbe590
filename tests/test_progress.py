"""What is said of work: lines that stay, signs of life in a pipe, a bar on a terminal alone."""

import io
import re
import time

import pytest
from rich.console import Console

from scripts import sweep
from ultra_hstu import progress


class Closed(Console):
    def print(self, *_, **__):
        raise BrokenPipeError


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=120)


def said(console):
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()


def test_a_pipe_hears_of_long_work_and_of_its_end(screen, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.05)
    monkeypatch.setattr(progress, "REPEAT_S", 0.1)
    with progress.waiting(screen, "data", "reading it") as came:
        time.sleep(0.5)
        came("three users")
    *waited, end = said(screen)
    assert len(waited) >= 2 and all(
        re.fullmatch(r"data      reading it, 0\.\d s so far", text) for text in waited
    )
    assert re.fullmatch(r"data      three users \(0\.\d s\)", end)


def test_work_is_heard_of_in_time():
    """Within two seconds, and at least every ten, however long it takes."""
    assert progress.FIRST_S <= 2 and progress.REPEAT_S <= 10 and sweep.SAY_S <= 10


def test_an_output_that_closes_meanwhile_is_an_error(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.01)
    closed = Closed(file=io.StringIO())
    with pytest.raises(BrokenPipeError), progress.waiting(closed, "data", "reading it"):
        time.sleep(0.2)


def test_short_work_is_one_line_and_failed_work_none(screen):
    with progress.waiting(screen, "data", "reading it") as came:
        came("three users")
    with pytest.raises(ValueError), progress.waiting(screen, "data", "reading it"):
        raise ValueError
    assert said(screen) == ["data      three users (0.0 s)"]


def pass_two_epochs(console):
    epochs = progress.Epochs(console, 3, 2.0, at_most=True)
    with epochs:
        for epoch in (1, 2):
            epochs.begin(epoch, 1000, 0)
            time.sleep(0.02)
            epochs.reached(1)
            in_call = epochs.promise()
            epochs.doing("evaluating")
            epochs.end(f"loss {epoch}.0")
    return in_call


def test_epochs_have_lines_that_stay_and_the_first_is_estimated(screen):
    in_call = pass_two_epochs(screen)
    estimate, first, second = said(screen)
    assert re.fullmatch(
        r"epoch     1/3      about \d\d s an epoch without evaluation, at most \d+ (s|min) for all "
        "that are left",
        estimate,
    )
    assert re.fullmatch(r"epoch     1/3      loss 1.0  0.\d s, at most 0.\d s left", first)
    assert re.fullmatch(r"epoch     2/3      loss 2.0  0.\d s, at most 0.\d s left", second)
    assert in_call.startswith("stopping: the call that is under way ends, and the state is saved")
    assert in_call.endswith("in about 2.0 s")


def test_a_terminal_has_a_bar_and_the_same_lines(screen):
    terminal = Console(
        file=io.StringIO(), width=120, force_terminal=True, _environ={"TERM": "xterm"}
    )
    pass_two_epochs(terminal)
    pass_two_epochs(screen)
    lines = [re.sub(r"\d+(\.\d)? (s|min)", "T", line) for line in said(screen)]
    shown = [re.sub(r"\d+(\.\d)? (s|min)", "T", line).strip() for line in said(terminal)]
    assert all(line in shown for line in lines)
    assert any("━" in line for line in shown) and not any("━" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (12.3, "12 s"), (1200.0, "20 min"), (12600.0, "3.5 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
