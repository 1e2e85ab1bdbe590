"""Trains runs in processes of their own, several at a time, and keeps their records."""

import contextlib
import dataclasses
import fcntl
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.record import Json, read
from scripts.studies import STUDIES, StudyRun
from ultra_hstu import progress, signals
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.json_files import write_json
from ultra_hstu.run import Interrupted

POLL_S, SAY_S = 0.2, 8.0  # between two looks at the processes, and two signs of life
SHOWN = ("hr@10", "ndcg@10", "ne")  # metrics of a finished run
SAVE_S = 30.0  # for runs to save their state before the time is up
COLLECT_S = 30.0  # for the record of a run all of whose seeds are trained


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Claims a folder of runs; the file descriptor of its lock, which processes may inherit.

    Raises:
      ValueError: another sweep, or a run of one, is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another sweep works in {folder}, or a run of one that was killed: wait for it, "
                "or choose another --workdir"
            ) from None
        yield file.fileno()


@dataclasses.dataclass(frozen=True)
class Budget:
    """Time that a sweep has, from when this is made: so many minutes, or None for all it needs."""

    minutes: float | None
    began: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        """In seconds."""
        if self.minutes is None:
            return float("inf")
        return self.began + 60 * self.minutes - time.monotonic()


def corrected(seconds: float, factors: Sequence[float]) -> float:
    """What a run will take by a guess, and by how wrong other guesses were: measured / guessed."""
    return seconds * (statistics.median(factors) if factors else 1.0)


def copy_of(source: str, copies: Path | None) -> Path | None:
    """The folder with a copy of a source's raw data, if there is one."""
    copy = None if copies is None else copies / source
    return copy if copy is not None and copy.exists() else None


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process does of a run: it trains a seed; None: it makes the record of all seeds."""

    run: StudyRun
    seed: int | None = None

    @property
    def name(self) -> str:
        return self.run.name if self.seed is None else f"{self.run.name}, seed {self.seed}"


def parts_of(run: StudyRun) -> list[Part]:
    """A process for each seed, then one for the record; one for all where there is one seed."""
    seeds = [Part(run, seed) for seed in run.seeds] if len(run.seeds) > 1 else []
    return [*seeds, Part(run)]


@dataclasses.dataclass(eq=False)
class Sweep:
    """A folder of runs, which one sweep works in at a time.

    Args:
      folder: NAME/seed_N for every run, NAME*.log for what it says, NAME.json for its record.
      results: where records of finished runs are kept; those that are there are not repeated.
      copies: a folder of raw data, COPIES/SOURCE for every source; None: data is downloaded.
      platform: of the devices, as records name it: seconds of other platforms predict nothing.
      jobs: processes at one time; each trains one seed of a run.
      minutes: when to stop, with the state of all runs saved; None: when all are trained.
      conditions: what records say beside what `experiments.train` writes.
      program: what trains a run, with the arguments of `experiments.train`.
    """

    folder: Path
    results: Path
    console: Console
    copies: Path | None = None
    platform: str = "gpu"
    jobs: int = 1
    minutes: float | None = None
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    program: Sequence[str] = (sys.executable, "-m", "experiments.train")

    def __post_init__(self) -> None:
        self.budget = Budget(self.minutes)
        self.known = [run for list_of in STUDIES.values() for run in list_of()]
        self.problems: dict[str, str] = {}  # by name of a run
        self.lock = -1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Claims the folder. Raises ValueError where another sweep, or a run of one, is at work.

        Runs inherit the lock: those of a sweep that was killed keep the next one out until they
        end.
        """
        self.results.mkdir(parents=True, exist_ok=True)
        with claimed(self.folder) as self.lock:
            yield

    def record(self, run: StudyRun) -> Json:
        """The record of a finished run; empty where some seed is missing, or the recipe another.

        An interrupted run has none: `experiments.train` writes it once all seeds are done, and the
        sweep adds the recipe. Of `results`, records from before there were studies name none; those
        of other commands are of other runs.
        """
        for folder, unnamed in ((self.results, run.recipe), (self.folder, None)):
            found = read(folder / f"{run.name}.json")
            seeds = {one["seed"] for one in found.get("runs", [])}
            same = found.get("recipe", unnamed) == run.recipe
            if (
                set(run.seeds) <= seeds
                and same
                and "experiments.train " in found.get("command", "")
            ):
                return found
        return {}

    def predicted(self, run: StudyRun) -> tuple[float, bool]:
        """Seconds for all seeds, and whether records of the same configuration say so."""
        factors = []
        for other in self.known:
            if other.config == run.config:
                found = read(self.results / f"{other.name}.json")
                each = [one["seconds"] + one["compile_seconds"] for one in found.get("runs", [])]
                if each and found.get("platform") == self.platform:
                    factors.append(statistics.mean(each) / other.seconds)
        return corrected(run.seconds, factors) * len(run.seeds), bool(factors)

    def plan(self, runs: Sequence[StudyRun]) -> list[StudyRun]:
        """Says which runs are finished and what the others take; returns those."""
        left, total = [], 0.0
        for run in runs:
            seconds, known = self.predicted(run)
            state = "finished"
            if not self.record(run):
                left.append(run)
                total += seconds
                told = "by a record" if known else "guessed"
                state = f"{len(run.seeds)} seeds, {progress.duration(seconds)} {told}"
            progress.line(self.console, "plan", f"{run.name}: {state}")
        minutes = f"{total / 60:.0f} minutes of runs, {total / 60 / self.jobs:.0f} at best with "
        minutes += f"{self.jobs} at a time"
        limit = "" if self.minutes is None else f", at most {self.minutes:g} minutes"
        progress.line(self.console, "plan", f"{len(left)} of {len(runs)} left: {minutes}{limit}")
        return left

    def train(self, runs: Sequence[StudyRun]) -> list[StudyRun]:
        """Trains what is not finished, in this order; what is left for want of time.

        `problems` says what could not be trained.

        Raises:
          Interrupted: after SIGTERM or SIGINT, once all runs have saved their state.
        """
        left = [run for run in runs if run.name not in self.problems and not self._kept(run)]
        waiting = [part for run in self._with_data(left) for part in parts_of(run)]
        active: dict[str, tuple[Part, subprocess.Popen[bytes]]] = {}
        began = said = time.monotonic()
        ending = False
        with signals.stopping(lambda: "stopping: all runs save their state") as stop:
            try:
                while waiting or active:
                    if stop.requested or self.budget.left() <= SAVE_S:
                        waiting, ending = [], True
                        self._end([process for _, process in active.values()])
                    begun = [part.run for part, _ in active.values()]
                    if len(active) < self.jobs and (part := self._next(waiting, begun)) is not None:
                        waiting.remove(part)
                        active[part.name] = (part, self._start(part))
                        continue
                    if not active:
                        break  # what is left takes longer than there is time
                    for part, process in [
                        one for one in active.values() if one[1].poll() is not None
                    ]:
                        del active[part.name]
                        self._ended(part, process.returncode, asked=ending)
                        if part.run.name in self.problems:
                            waiting = [other for other in waiting if other.run != part.run]
                    if time.monotonic() - said > SAY_S:
                        said = time.monotonic()
                        names = ", ".join(active)
                        spent = progress.duration(said - began)
                        rest = f"{len(waiting)} are waiting; training: {names}; {spent} so far"
                        progress.line(self.console, "study", rest)
                    time.sleep(POLL_S)
            finally:  # after an error runs would go on, and hold the folder
                self._end([process for _, process in active.values()])
        if stop.requested:
            raise Interrupted(f"stopped; the same command goes on in {self.folder}", stop.requested)
        return [run for run in runs if run.name not in self.problems and not self.record(run)]

    def _next(self, waiting: Sequence[Part], begun: Sequence[StudyRun]) -> Part | None:
        """The first part that is expected to end in time; a record waits for its seeds."""
        room = self.budget.left() - SAVE_S
        for place, part in enumerate(waiting):
            seconds = self.predicted(part.run)[0] / len(part.run.seeds)
            if part.seed is None and len(part.run.seeds) > 1:
                if part.run in begun or any(other.run == part.run for other in waiting[:place]):
                    continue
                seconds = COLLECT_S
            if seconds <= room:
                return part
        return None

    def _kept(self, run: StudyRun) -> bool:
        """Whether the run is finished; its record then stands in `results`, but for a trial."""
        found, path = self.record(run), self.results / f"{run.name}.json"
        if found and not run.trial and read(path) != found:
            write_json(path, found)
        return bool(found)

    def _with_data(self, runs: Sequence[StudyRun]) -> list[StudyRun]:
        """The runs whose data can be read; it is prepared here, once for all of them."""
        problems: dict[str, str | None] = {}
        for run in runs:
            data = run.made().data
            if data.source not in problems:
                raw_dir = copy_of(data.source, self.copies)
                data = changed(data, raw_dir=None if raw_dir is None else str(raw_dir.absolute()))
                try:
                    with progress.waiting(self.console, "data", f"reading {data.source}") as came:
                        came(f"{data.source}: {progress.counts(load_interactions(data))}")
                    problems[data.source] = None
                except (ValueError, OSError) as error:
                    problems[data.source] = (
                        f"{error}\n  get it: ultra-hstu inspect "
                        f"--config.data.source={data.source}, or put a copy into "
                        f"{self.copies or 'COPIES'}/{data.source} (--copies)"
                    )
            if (problem := problems[data.source]) is not None:
                self._fail(run, problem)
        return [run for run in runs if run.name not in self.problems]

    def _start(self, part: Part) -> subprocess.Popen[bytes]:
        run, log = part.run, self._log(part)
        raw_dir = copy_of(run.made().data.source, self.copies)
        arguments = [
            *(run if part.seed is None else dataclasses.replace(run, seeds=(part.seed,))).flags(),
            *([] if raw_dir is None else [f"--config.data.raw_dir={raw_dir}"]),
            f"--workdir={self.folder / run.name}",
            *([f"--record={self.folder / run.name}.json"] if part.seed is None else []),
        ]
        progress.line(self.console, "begin", part.name)
        with open(log, "ab") as file:
            return subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C is for the sweep, which asks its runs to stop
            )

    def _log(self, part: Part) -> Path:
        """The file of what a part says."""
        seed = "" if part.seed is None else f"_seed_{part.seed}"
        return self.folder / f"{part.run.name}{seed}.log"

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Asks the runs to save their state and end; those that do not are killed."""
        for process in processes:
            process.terminate()
        until = time.monotonic() + SAVE_S
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ended(self, part: Part, code: int, *, asked: bool) -> None:
        run = part.run
        if code and asked:
            progress.line(self.console, "stopped", f"{part.name}: the same command goes on with it")
        elif code:
            log = self._log(part).read_text(errors="replace")
            why = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            self._fail(run, "\n".join([why, *log.splitlines()[-3:]]))
        elif part.seed is None:
            path = self.folder / f"{run.name}.json"
            found = read(path)
            found |= {**self.conditions, "overrides": dict(run.overrides), "recipe": run.recipe}
            found |= {"shared_device": self.jobs > 1, "command": self._command(found["command"])}
            write_json(path, found)
            self._kept(run)
            mean = found.get("mean") or found["runs"][0]["best"]
            shown = [f"{name} {mean[name]:.4f}" for name in SHOWN if name in mean]
            progress.line(self.console, "done", f"{run.name}: {'  '.join(shown)}")

    def _fail(self, run: StudyRun, problem: str) -> None:
        self.problems[run.name] = problem
        progress.line(self.console, "failed", f"{run.name}: {problem}")

    def _command(self, command: str) -> str:
        """The command without paths of this machine."""
        if self.copies is not None:
            for source in sorted(os.listdir(self.copies), key=len, reverse=True):
                command = command.replace(f"={self.copies / source} ", "=RAW_DIR ")
        return command.replace(str(self.folder), "runs") if self.folder.is_absolute() else command
