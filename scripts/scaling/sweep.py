"""Runs of a sweep, one after another: what is done stays done, and a budget of minutes is kept.

Several processes may each train a part of the runs and share the record, which is written after
every run. A run that it holds, or that is finished in the folder, is
not trained again; one that was killed goes on from its checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from experiments.record import Json, Record, read
from scripts.studies import digest
from scripts.sweep import Budget, claimed, corrected
from ultra_hstu import progress
from ultra_hstu.config import Config
from ultra_hstu.task import Task
from ultra_hstu.train import train

ORIGIN = ("device", "commit", "date")  # what the entry of a run says of its making


@dataclasses.dataclass(frozen=True)
class ScalingRun:
    """A run of a sweep.

    Attributes:
      name: in the record, and of its folder.
      group: runs whose predictions are wrong alike.
      seconds: predicted, from the start of the run to its result.
      about: what the record says of it beside its result.
    """

    name: str
    group: str
    config: Config
    seconds: float
    about: Json = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def shared(record: Record) -> Iterator[None]:
    """The record with the data and runs that its file holds now, for one process at a time."""
    if record.path is None:
        yield
        return
    folder = os.open(record.path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        now = read(record.path)
        record.values |= {name: now[name] for name in ("data", "runs") if name in now}
        yield
    finally:
        os.close(folder)


def add_data(record: Record, fingerprints: dict[str, Json]) -> None:
    """Says what the runs are trained on. Raises ValueError where the record's had other data."""
    with shared(record):
        known = record.values.get("data", {})
        for name, one in fingerprints.items():
            if known.get(name, one) != one:
                raise ValueError(
                    f"{record.path} holds runs on other data of {name} (sha256 "
                    f"{known[name]['sha256']}, here {one['sha256']}): name another --record"
                )
        record.add(data=known | fingerprints)


def finished(record: Record) -> dict[str, Json]:
    """The runs that a record holds, by name."""
    return dict(record.values.get("runs", {}))


def predicted(job: ScalingRun, runs: dict[str, Json], device: str) -> float:
    """Seconds that a job will take: its prediction, corrected by finished runs of its group."""
    factors = [
        run["seconds_measured"] / run["seconds_predicted"]
        for run in runs.values()
        if run["group"] == job.group and run["device"] == device and run["seconds_measured"]
    ]
    return corrected(job.seconds, factors)


def sweep(
    jobs: Sequence[ScalingRun],
    folder: Path,
    record: Record,
    *,
    load: Callable[[Config], Task],
    measure: Callable[[ScalingRun, Task, Path], Json],
    minutes: float | None,
    console: Console,
) -> list[ScalingRun]:
    """Trains jobs in their order, and records each; those that are left, or have diverged.

    Args:
      measure: what the record keeps of a finished run beside its result, from its folder.
      minutes: a job that is predicted to end after so long is left, shorter ones are not.

    Raises:
      ValueError: another sweep in the folder, or a record of other settings.
    """
    budget, left = Budget(minutes), []
    device = record.values["device"]
    with claimed(folder):
        for number, job in enumerate(jobs, start=1):
            runs, settings = finished(record), digest(job.config)
            if (run := runs.get(job.name)) is not None:
                if run["settings"] != settings:
                    raise ValueError(
                        f"{record.path} holds {job.name} of other settings: name another --record"
                    )
                continue
            expected = predicted(job, runs, device)
            if expected > budget.left():
                left.append(job)
                continue
            took = progress.duration(expected)
            progress.line(console, "run", f"{number} of {len(jobs)}, {job.name}: about {took}")
            begun, workdir = time.perf_counter(), folder / job.name
            goes_on, task = workdir.exists(), load(job.config)
            try:
                result = train(job.config, workdir, console=console, task=task)
            except FloatingPointError as error:  # the others are none the worse
                progress.line(console, "failed", f"{job.name}: {error}")
                left.append(job)
                continue
            entry = job.about | measure(job, task, workdir) | {
                "group": job.group,
                "settings": settings,
                "seconds_predicted": job.seconds,
                # Of a run that went on, it is not known.
                "seconds_measured": None if goes_on else time.perf_counter() - begun,
                "result": result,
                **{name: record.values[name] for name in ORIGIN},
            }  # fmt: skip
            with shared(record):
                record.add(runs=finished(record) | {job.name: entry})
    return left
