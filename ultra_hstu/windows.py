"""A run over data that goes on: a model learns a window, is judged by the next one, learns it, too.

Every window has a folder of its own, a run's like any other: commands evaluate, serve and export
its model. It holds what was known at the window's end, and nothing that came later.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ultra_hstu import progress, report, signals, tasks
from ultra_hstu.checkpoint import load_state
from ultra_hstu.compiling import Program
from ultra_hstu.config import Config
from ultra_hstu.criteria import Criteria, Metrics
from ultra_hstu.data import windows
from ultra_hstu.data.interactions import ARRAYS
from ultra_hstu.data.packing import Plan
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.fields import changed
from ultra_hstu.initial import like_of
from ultra_hstu.json_files import read_object, write_json
from ultra_hstu.parallel import processes
from ultra_hstu.run import Run
from ultra_hstu.step import TrainState, shapes
from ultra_hstu.task import Task
from ultra_hstu.trackers import Tracker
from ultra_hstu.vocabulary import Vocabulary, carried
from ultra_hstu.workdir import Workdir

ROW_FIELDS = {"window": int, "steps": int, "metrics": dict}  # of `result.json` in a window's folder
Row = dict[str, Any]

log = logging.getLogger(__name__)


class _Before(NamedTuple):
    """The model of the window before."""

    folder: Workdir
    vocabulary: Vocabulary
    state: TrainState | None = None  # None: it is in the folder

    def on(self, task: Task) -> TrainState:
        """Its state, on the vocabulary of a task."""
        state = self.state
        if state is None:
            state = load_state(self.folder, like_of(task, self.vocabulary)).state
        tables = task.vocabulary.tables(self.vocabulary)
        return carried(state, like_of(task), tables, item_std=task.item_std)


@dataclasses.dataclass
class _KeptPrograms:
    """What was compiled for earlier windows, for those of the same shapes; few have others."""

    training: list[tuple[Hashable, Program]] = dataclasses.field(default_factory=list)
    evaluators: list[Evaluator] = dataclasses.field(default_factory=list)


def train_windows(
    task: Task, root: Workdir, console: Console, trackers: Sequence[Tracker]
) -> dict[str, Any]:
    """Trains, or goes on training, on every window of a task's data; the result of all.

    Raises:
      ValueError: data of a finished window that has changed, and as `train`.
    """
    config, data = task.config, task.interactions
    config = changed(config, windows={"number": None})
    if config.data.source == ARRAYS:
        processes.broadcast(lambda: data.save(root.interactions))
    found, programs = windows.windows(data, config.windows), _KeptPrograms()
    progress.line(console, "windows", f"{len(found)}, {found[0].words} the first")
    before: _Before | None = None
    rows: list[Row] = []
    metric_log: report.MetricLog | None = None
    try:
        for window in found:
            folder = Workdir(root.path / f"window_{window.number:03d}")
            if folder.result.exists():
                row = read_object(folder.result, ROW_FIELDS, f"delete {folder.path}")
                before = _Before(folder, Vocabulary.load(folder))
            else:
                if before is not None and before.state is None:  # has what is there changed?
                    before.folder.check_data(windows.until(data, window.start))
                if metric_log is None and processes.is_first():
                    settings, done = dataclasses.asdict(config), sum(one["steps"] for one in rows)
                    metric_log = report.MetricLog(
                        root.metrics, root.tensorboard, settings, trackers, resume_step=done
                    )
                here = tasks.of_window(config, data, window, roomy=True)
                row, before = _train_window(here, folder, window, before, programs, console)
                done = sum(one["steps"] for one in rows) + row["steps"]
                if metric_log is not None:
                    metric_log.write(done, row | row["metrics"])
                _forget(root, window.number, config)
            rows.append(row)
            if processes.is_first():
                write_json(root.result, summary(rows, config, task.criteria))
            progress.line(console, "window", _line(row, task.criteria, len(found)))
    finally:
        if metric_log is not None:
            metric_log.close()
    if processes.is_first():
        title = f"{config.name}: each window before it is learned, {report.conditions(config)}"
        report.draw_windows({config.name: rows}, root.curves, task.criteria, title=title)
    return summary(rows, config, task.criteria)


def summary(rows: Sequence[Row], config: Config, criteria: Criteria) -> dict[str, Any]:
    """The result of a run: a row a window, and the means over its targets in all windows."""
    judged = [row for row in rows if row["metrics"]]
    weights = [row["targets"] for row in judged]
    names = [name for name in judged[0]["metrics"]] if judged else []
    means = {
        name: sum(row["metrics"].get(name, 0.0) * n for row, n in zip(judged, weights, strict=True))
        / sum(weights)
        for name in names
        if all(name in row["metrics"] for row in judged)
    }
    origin = {name: one for name, one in rows[0].items() if name == "init_from"}
    return origin | {
        "protocol": config.train.protocol,
        "split": "test",
        "eval": config.evaluation,
        "seed": config.train.seed,
        "steps": sum(row["steps"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "compile_seconds": sum(row["compile_seconds"] for row in rows),
        "windows": list(rows),
        "best": means,
        "best_epoch": 0,
    }


def _line(row: Row, criteria: Criteria, count: int) -> str:
    metrics = row["metrics"]
    shown = [f"{name} {metrics[name]:.4f}" for name in criteria.curves if name in metrics]
    judged = "  ".join(shown) if shown else row["note"]
    return (
        f"{row['window']}/{count - 1:<4} {row['period']}  {row['events']:,} events, "
        f"{row['targets']:,} targets: {judged}  then {row['steps']:,} steps"
    )


def _train_window(
    task: Task,
    folder: Workdir,
    window: windows.Window,
    before: _Before | None,
    programs: _KeptPrograms,
    console: Console,
) -> tuple[Row, _Before]:
    processes.broadcast(lambda: folder.claim(task.config))
    try:
        processes.broadcast(lambda: folder.claim_data(task.interactions))
        processes.broadcast(lambda: task.vocabulary.save(folder))
        run = WindowRun(task, folder, console, window, before, programs)
        try:
            return run.to_the_end(), _Before(folder, task.vocabulary, run.state)
        finally:
            run.checkpoints.let_go()
    finally:
        folder.release()


def _forget(root: Workdir, number: int, config: Config) -> None:
    """Removes the checkpoints of windows that are older than `train.keep_checkpoints`."""
    if processes.is_first():
        for old, folder in root.windows.items():
            if old <= number - config.train.keep_checkpoints:
                shutil.rmtree(folder.checkpoints, ignore_errors=True)


class WindowRun(Run):
    """The run of one window: the model of the one before is judged by it, and then learns it."""

    def __init__(
        self,
        task: Task,
        folder: Workdir,
        console: Console,
        window: windows.Window,
        before: _Before | None,
        programs: _KeptPrograms,
    ):
        self.task, self.config, self.folder = task, task.config, folder
        # Epochs of later windows are short: the run says a line a window.
        self.console = console if before is None else Console(quiet=True)
        self.window, self.before, self.programs = window, before, programs
        self.patience, self.log = None, None
        self.limit = None if before is None else self.config.windows.steps
        self.learns = task.has("train")
        config = self.config
        if self.learns:
            self.loader = task.loader(
                "train",
                batch_users=config.data.batch_users,
                steps_per_call=config.train.steps_per_call,
            )
        self.is_first, self.starts = before is None, config.windows.start == "anew"
        if before is None or self.starts:
            own, self.starts = task.vocabulary, True
            first = task.recipe.start(config.train.seed)  # has entries where there is but room
            first = carried(first, like_of(task), own.tables(own), item_std=None)
        else:
            first = before.on(task)
        self.first_step = int(first.step)
        self._begin(first)

    def to_the_end(self, *, profile: bool = False) -> Row:
        self.note = ""
        judge = self._judge()
        if judge is not None and self.position.epoch == 0 and self.position.batch == 0:
            self.position.last = self._judged(judge)
        if not self.learns:
            self.note = self.note or "no event behind another one: nothing to learn"
        elif not self._ended():
            self.run_steps = self._compile()
            self._train()
        return self._finish()

    def _judge(self) -> Evaluator | None:
        """What judges the model of the window before; None, and a note why, if nothing does."""
        if self.before is None or not self.task.has("test"):
            self.note = "the first window" if self.before is None else "no event with a history"
            return None
        try:
            return self.task.evaluator("test")
        except ValueError as error:  # labels of one class
            self.note = str(error)
            log.warning("window %d is not judged by: %s", self.window.number, error)
            return None

    def _judged(self, evaluator: Evaluator) -> Metrics:
        """The metrics of the model of the window before on this one."""
        assert self.before is not None
        adopted = any(evaluator.adopt(other) for other in self.programs.evaluators)
        anew = self.config.windows.start == "anew"
        state = self.before.on(self.task) if anew else self.state
        started = time.perf_counter()
        evaluator.compile(state.params)
        self.position.compile_seconds += time.perf_counter() - started
        if not adopted:
            self.programs.evaluators.append(evaluator)
        return processes.broadcast(lambda: dict(evaluator(state.params)))

    def _compile(self, profile: Path | None = None) -> Program:
        group = next(iter(self.loader.groups(self.loader.plan())))
        key = shapes((self.state, group.feed))
        for other, program in self.programs.training:
            if other == key:
                return program
        program = super()._compile(profile)
        if not self.task.recipe.holds_data:
            self.programs.training.append((key, program))
        return program

    def _evaluator(self) -> None:
        """The window was judged before."""

    def _plan(self) -> Plan:
        plan = super()._plan()
        if self.limit is None:
            return plan
        left = self.limit - (self.step - self.first_step - self.position.batch)
        return plan.cut(left)

    def _ended(self) -> bool:
        if self.limit is not None:
            return self.step - self.first_step >= self.limit
        return self.position.epoch >= self.config.train.epochs

    def _evaluation_due(self) -> bool:
        return False

    def _save_due(self) -> bool:
        return self._ended()

    def _train_epoch(self, stop: signals.Stop, epochs: progress.Epochs) -> Metrics:
        record = super()._train_epoch(stop, epochs)
        self.position.last = self.position.last | {"loss": record["loss"]}
        return record

    def _finish(self) -> Row:
        position, window, data = self.position, self.window, self.task.interactions
        metrics = dict(position.last)
        loss = metrics.pop("loss", None)
        if not self.learns:
            self._save(best=False)
        self._warn_if_exploded()
        self.checkpoints.close()
        row: Row = {
            "window": window.number,
            "period": window.words,
            **windows.newcomers(data, window.start),
            "targets": self.task.count("test") if metrics else 0,
            "metrics": metrics,
            "loss": loss,
            "steps": self.step - self.first_step,
            "step": self.step,
            "seconds": position.seconds,
            "compile_seconds": position.compile_seconds,
        }
        if self.note:
            row["note"] = self.note
        if position.init_from:
            row["init_from"] = position.init_from
        if processes.is_first():
            write_json(self.folder.result, row)
        processes.barrier()
        return row
