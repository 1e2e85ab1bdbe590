"""Measurements in several processes. They import this file, so it imports little."""

import collections
import functools
import os
import time

import pytest

from scripts.bench import turns


def prepared_and_measured(log, number):
    def note(event):
        with log.open("a") as file:
            file.write(f"{event}\n")

    for kind, context in (("prepare", turns.preparing), ("measure", turns.turn)):
        with context():
            note(f"{kind} begins")
            time.sleep(0.02)
            note(f"{kind} ends")
    return number**2


@pytest.mark.parametrize("jobs", [1, 3])
def test_nobody_prepares_while_somebody_measures(tmp_path, jobs):
    log = tmp_path / "log"
    tasks = [functools.partial(prepared_and_measured, log, n) for n in range(5)]
    assert sorted(turns.each(tasks, jobs)) == [(n, n**2) for n in range(5)]
    running = collections.Counter()
    for line in log.read_text().splitlines():
        kind, event = line.split()
        running[kind] += 1 if event == "begins" else -1
        assert running["measure"] <= 1 and not (running["measure"] and running["prepare"])
    assert not running.total()


def of_a_process(answer):
    """What `one_by_one` prepares: an answer from a process of its own, or an error, or no answer.

    The error comes before or after the wait.
    """
    if answer == "unprepared":
        raise ValueError(answer)

    def work():
        if answer == "killed":
            os._exit(1)
        if answer == "failed":
            raise ValueError(answer)
        return os.getpid()

    return work


def test_one_by_one():
    answers = ("unprepared", "failed", "killed", "good")
    tasks = [functools.partial(of_a_process, answer) for answer in answers]
    *errors, process = turns.one_by_one(tasks)
    assert process != os.getpid()
    for error, message in zip(
        errors,
        ("ValueError: unprepared", "ValueError: failed", "ended without an answer"),
        strict=True,
    ):
        assert isinstance(error, RuntimeError) and message in str(error)
