"""Metrics reach TensorBoard with the configuration, and trackers whose trouble ends no run."""

import re
from pathlib import Path

import pytest

from experiments.train import read_tracker
from ultra_hstu.report import MetricLog, read_metrics
from ultra_hstu.trackers import TensorBoard, Tracker

ROOT = Path(__file__).parent.parent
CONFIG = {"name": "shop", "model": {"width": 77}}


class Calls:
    def __init__(self, failing=""):
        self.calls, self.failing = [], failing

    def _called(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.failing:
            raise ConnectionError("no network")

    def config(self, values):
        self._called("config", values)

    def log(self, step, metrics):
        self._called("log", step, metrics)

    def close(self):
        self._called("close")


def run(tmp_path, *trackers):
    log = MetricLog(tmp_path / "m.jsonl", tmp_path / "tb", config=CONFIG, trackers=trackers)
    log.write(8, {"epoch": 1, "loss": 2.5, "split": "test"})
    log.write(16, {"epoch": 2, "loss": 1.5, "split": "test"})
    log.close()


def test_a_tracker_gets_configuration_and_numbers(tmp_path):
    tracker = Calls()
    run(tmp_path, tracker)
    first, second = {"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.5}
    wanted = [("config", CONFIG), ("log", 8, first), ("log", 16, second), ("close",)]
    assert tracker.calls == wanted
    assert isinstance(tracker, Tracker) and issubclass(TensorBoard, Tracker)


@pytest.mark.parametrize(("method", "calls"), [("config", 1), ("log", 2), ("close", 4)])
def test_a_failing_tracker_costs_a_warning(tmp_path, caplog, method, calls):
    failing, other = Calls(method), Calls()
    run(tmp_path, failing, other)
    assert caplog.text.count(f"Calls.{method} failed (ConnectionError: no network)") == 1
    assert len(failing.calls) == calls and len(other.calls) == 4
    assert len(read_metrics(tmp_path / "m.jsonl")) == 2


def test_tensorboard_holds_the_configuration(tmp_path):
    run(tmp_path)
    (events,) = (tmp_path / "tb").iterdir()
    written = events.read_bytes()
    assert b'"width": 77' in written and written.count(b"loss") == 2


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "Calls", "there is no file .*own.py'; give FILE.py:NAME"),
        ("import nowhere_to_be_found", "Calls", "ModuleNotFoundError: .*nowhere_to_be_found"),
        ("Calls = 3", "Calls", "own.py has no class or function 'Calls'"),
        ("", "", "own.py has no class or function ''"),
    ],
)
def test_trackers_of_files_that_are_not_there(tmp_path, text, name, message):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"--tracker=.*{message}"):
        read_tracker(f"{file}:{name}")
    file.write_text("class Calls: kind = 'mine'")
    assert read_tracker(f"{file}:Calls")().kind == "mine"


def test_what_pages_install_is_pinned():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    named = re.findall(r"^pip install ([a-z]\S*) -c constraints.txt", pages, re.M)
    assert "tensorboard" in named and set(named) <= pinned
