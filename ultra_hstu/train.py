"""Training: epochs of compiled multi-step calls, evaluation, checkpoints, exact resume.

A step is a pure function of (state, batch, key), the key a function of (seed, step) and the batch
of (seed, epoch, number in the epoch). So the position is three integers, and a run that was killed
and started again computes the same numbers as one that was not.
"""

import dataclasses
import functools
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from rich.console import Console

from ultra_hstu import optim, progress, report, signals, starts, tasks
from ultra_hstu.checkpoint import Checkpoints, Position, abstract
from ultra_hstu.compiling import compile_run
from ultra_hstu.config import Config
from ultra_hstu.criteria import Metrics
from ultra_hstu.data.feed import Group
from ultra_hstu.parallel import make_mesh, processes
from ultra_hstu.step import HISTORY, largest_weight
from ultra_hstu.task import Task
from ultra_hstu.trackers import Tracker
from ultra_hstu.workdir import Workdir, write_json

# Epochs without a better metric where train.patience is None and the protocol has validation data.
VALIDATED_PATIENCE = 10
LARGEST_WEIGHT = 1e6  # beyond it, float32 loses updates of less than 0.06

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); its state is saved.

    Attributes:
      signal: the number.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


def train(
    config: Config,
    workdir: Path | str,
    *,
    console: Console | None = None,
    task: Task | None = None,
    overwrite: bool = False,
    trackers: Sequence[Tracker] = (),
    profile: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `workdir`; its result, as `result.json` holds it.

    Args:
      task: the loaded data of this configuration, where several runs share it.
      overwrite: start anew, and remove the run that is in `workdir`.
      trackers: what else receives the metrics of every epoch.
      profile: trace some steps, and print what they spend their time on (`ultra_hstu.profiling`).

    Raises:
      ValueError: bad configuration or data, a folder that belongs to another run, or a profile of a
        run that has no steps left.
      FloatingPointError: a loss that is not finite, with step, learning rate and gradient norm.
      OSError: a checkpoint that could not be written.
      Interrupted: after SIGTERM or SIGINT while it trained, once the state is saved.
    """
    config.validate()
    tasks.check(config)
    console = (console or Console()) if processes.is_first() else Console(quiet=True)
    folder = Workdir(workdir)
    config = _claim(folder, config, overwrite)
    with starts.recorded(folder):
        task = tasks.load(config, console) if task is None else task.with_config(config)
        processes.require_same(
            "data set", task.interactions.fingerprint() if processes.several() else {}
        )
        with jax.default_matmul_precision(config.train.matmul_precision):
            with progress.waiting(console, "start", "making the model, trying out a checkpoint"):
                processes.broadcast(lambda: folder.claim_data(task.interactions))
                run = _Run(task, folder, console, trackers)
            try:
                return run.to_the_end(profile and processes.is_first())
            finally:
                run.checkpoints.let_go()
                if run.log is not None:
                    run.log.close()


def _claim(folder: Workdir, config: Config, overwrite: bool) -> Config:
    """Claims the folder for all processes, one of which writes; the configuration with its groups.

    Raises ValueError as `Workdir.claim`.
    """
    settings = dataclasses.asdict(config)
    for name in ("raw_dir", "data_dir"):  # a host may have them elsewhere
        settings["data"].pop(name)
    processes.require_same("configuration", settings)
    if processes.several() and config.parallel.data * config.parallel.context == 1:
        raise ValueError(
            "parallel.data=1 x parallel.context=1 is a run of one device, but "
            f"{jax.process_count()} processes with {jax.device_count()} devices are "
            "to share it: set --config.parallel.data and --config.parallel.context"
        )

    def claim() -> int:
        with_groups = folder.with_groups(config, overwrite=overwrite)
        if config.parallel.data * config.parallel.context > 1:
            # Raises before the folder is this run's.
            make_mesh(config.parallel.data, config.parallel.context)
        folder.claim(with_groups, overwrite=overwrite)
        return with_groups.parallel.batch_groups

    groups = processes.broadcast(claim)
    seen = processes.all_gather(folder.config.exists())
    if not all(seen):
        folder.release()
        raise ValueError(
            f"process {seen.index(False)} does not see {folder.config}, which process 0 has "
            "written: all processes must share --workdir"
        )
    return config.in_groups(groups)


class _Run:
    def __init__(self, task: Task, folder: Workdir, console: Console, trackers: Sequence[Tracker]):
        self.task, self.config, self.folder, self.console = task, task.config, folder, console
        config, published = self.config.train, self.config.train.protocol == "published"
        self.loader = task.loader(
            "train", batch_users=self.config.data.batch_users, steps_per_call=config.steps_per_call
        )
        self.split = "test" if published else "validation"
        self.evaluator = task.evaluator(self.split)
        # Made now, so that data without test events is an error before training.
        self.test_evaluator = self.evaluator if published else task.evaluator("test")
        self.patience = config.patience or (None if published else VALIDATED_PATIENCE)
        self.schedule = optim.learning_rate(self.config.optim)
        self.checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        self.state, self.position = task.recipe.start(config.seed), Position()
        started = time.perf_counter()
        if (restored := self.checkpoints.restore(abstract(self.state))) is not None:
            step, self.state, position = restored
            self.position = Position.of(position, f"checkpoint {folder.checkpoints / str(step)}")
            if self.position.epoch > config.epochs:
                raise ValueError(
                    f"train.epochs={config.epochs}, but this run has trained "
                    f"{self.position.epoch} epochs already: give at least as many"
                )
            self.checkpoints.drop_after(step)
        else:
            self.state = self.checkpoints.try_out(self.state)
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - started  # reading it back takes as long
        self.log: report.MetricLog | None = None
        if processes.is_first():
            settings = dataclasses.asdict(self.config)
            self.log = report.MetricLog(
                folder.metrics, folder.tensorboard, settings, trackers, resume_step=self.step
            )

    @property
    def step(self) -> int:
        return int(self.state.step)

    def to_the_end(self, profile: bool) -> dict[str, Any]:
        position = self.position
        if self._ended():
            before = f"this run has finished before, after {position.epoch} epochs"
            if profile:
                raise ValueError(f"{before}: --profile needs steps, so raise train.epochs")
            progress.line(self.console, "resume", f"{before}: its result is given again")
        else:
            if self.step:
                where = f"step {self.step}, epoch {position.epoch + 1}"
                progress.line(self.console, "resume", f"going on from {where}")
            started = time.perf_counter()
            self.run_steps = compile_run(
                self.task,
                self.loader,
                self.evaluator,
                self.state,
                self.console,
                profile=self.folder.profile if profile else None,
            )
            position.compile_seconds += time.perf_counter() - started
            self._train()
        with progress.waiting(self.console, "result", "evaluating the best epoch") as came:
            result = self._finish()
            trained = f"{position.epoch} epochs in {progress.duration(position.seconds)}"
            came(f"finished: {trained}, epoch {position.best_epoch} is the best")
        return result

    def _train(self) -> None:
        config, position = self.config.train, self.position
        epochs = progress.Epochs(
            self.console, config.epochs, self.save_seconds, at_most=self.patience is not None
        )
        with signals.stopping(epochs.promise) as stop, epochs:
            while not self._ended():
                started = time.perf_counter()
                record = self._train_epoch(stop, epochs)
                position.epoch += 1
                position.batch, position.loss_sum = 0, 0.0
                last_epoch = position.epoch == config.epochs
                metrics: Metrics = {}
                shown = f"loss {record['loss']:.3f}"
                if position.epoch % config.eval_every == 0 or last_epoch:
                    epochs.doing(f"evaluating on {self.split}")
                    metrics, found = self._evaluate()
                    shown += f"  {found}"
                seconds = time.perf_counter() - started
                position.seconds += seconds
                if self.log is not None:
                    head = {"epoch": position.epoch, "seconds": seconds, "split": self.split}
                    self.log.write(self.step, head | record | metrics)
                improved = position.best_epoch == position.epoch
                due = position.epoch % config.checkpoint_every == 0 or self._ended()
                cause = self._stop_signal(stop)()
                if improved or due or cause:
                    self._save(best=improved)
                epochs.end(shown + "  best" * improved)
                if cause:
                    self._interrupt(cause)
            epochs.doing("saving")
            self.checkpoints.wait()

    def _evaluate(self) -> tuple[Metrics, str]:
        """The metrics of the epoch, and those of them that its line shows."""
        position, criteria = self.position, self.evaluator.criteria
        found = self.evaluator(self.state.params)
        # Those of process 0, so that all decide alike about what follows from them.
        metrics = position.last = processes.broadcast(functools.partial(dict, found))
        position.evaluated_epoch = position.epoch
        if criteria.better(value := metrics[criteria.selection], position.best_metric):
            position.best_metric, position.best_epoch = value, position.epoch
        shown = [f"{name} {metrics[name]:.4f}" for name in criteria.curves if name in metrics]
        return metrics, "  ".join(shown)

    def _stop_signal(self, stop: signals.Stop) -> Callable[[], int]:
        """The signal that any of the processes was stopped by, or 0; all see the same."""
        return processes.all_reduce_max(stop.requested, self.task.recipe.mesh)

    def _interrupt(self, cause: int) -> None:
        self.checkpoints.wait()
        raise Interrupted(
            f"stopped by {signal.Signals(cause).name} at step {self.step}, epoch "
            f"{self.position.epoch + 1}; the same command goes on from there",
            cause,
        )

    def _checkpoint_due(self) -> Callable[[], int]:
        """Whether `train.checkpoint_minutes` have passed since the last; all see the same."""
        minutes, seconds = self.config.train.checkpoint_minutes, time.perf_counter() - self.saved_at
        due = minutes is not None and seconds >= 60 * minutes
        return processes.all_reduce_max(int(due), self.task.recipe.mesh)

    def _train_epoch(self, stop: signals.Stop, epochs: progress.Epochs) -> Metrics:
        position = self.position
        plan = self.loader.plan(seed=self.config.train.seed, epoch=position.epoch)
        epochs.begin(position.epoch + 1, len(plan), position.batch)
        waited, grad_norm, step = 0.0, 0.0, self.step
        groups = iter(self.loader.groups(plan, first=position.batch))
        running: _StartedCall | None = None  # the call before: read once the next is under way
        while True:
            started = time.perf_counter()
            group = next(groups, None)
            waited += time.perf_counter() - started
            signalled, due = self._stop_signal(stop), self._checkpoint_due()
            # Several processes agree on a stop while one more call runs.
            stopped = not processes.several() and signalled() > 0
            if group is not None and not stopped:
                self.state, history = self.run_steps(self.state, group.feed, np.int32(group.steps))
            if running is not None:
                grad_norm, running = self._read(running), None
                epochs.reached(position.batch)
            if group is None:
                break
            if not stopped:
                running = _StartedCall(group, step, history)
                step += group.steps
            cause = signalled()
            # Behind the last call of an epoch both wait for its evaluation.
            if stopped or (cause or due()) and group.first + group.steps < len(plan):
                if running is not None:
                    grad_norm, running = self._read(running), None
                self._save(best=False)
                if cause:
                    self._interrupt(cause)
        return {
            "loss": position.loss_sum / len(plan),
            "grad_norm": grad_norm,
            "learning_rate": float(self.schedule(max(step - 1, 0))),
            "input_wait_seconds": waited,
        }

    def _read(self, call: "_StartedCall") -> float:
        """Adds the losses of a call to the epoch's; the gradient norm of its last step."""
        steps, position = call.group.steps, self.position
        losses, norms = (np.asarray(call.history[name])[:steps] for name in HISTORY)
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not finite.all():
            bad = int(np.argmin(finite))
            step = call.first_step + bad
            self.checkpoints.wait()
            raise FloatingPointError(
                f"the loss is {losses[bad]} at step {step} (epoch {position.epoch + 1}, learning "
                f"rate {float(self.schedule(step)):g}, gradient norm {norms[bad]:g}). "
                f"{self.checkpoints.last_good()}. Lower optim.learning_rate or set "
                "optim.clip_norm, in a new --workdir."
            )
        position.loss_sum += float(np.sum(losses, dtype=np.float64))
        position.batch = call.group.first + steps
        return float(norms[-1])

    def _warn_if_exploded(self) -> None:
        if (largest := largest_weight(self.state.params)) > LARGEST_WEIGHT:
            log.warning(
                "a parameter has grown to %.3g: the run has diverged. Lower optim.learning_rate "
                "or set optim.clip_norm, in a new --workdir.",
                largest,
            )

    def _save(self, *, best: bool) -> None:
        position = dataclasses.asdict(self.position)
        self.checkpoints.save(self.step, self.state, position, best=best)
        self.saved_at = time.perf_counter()

    def _ended(self) -> bool:
        """Whether all epochs are trained, or patience has run out."""
        waited = self.position.evaluated_epoch - self.position.best_epoch
        out_of_patience = self.patience is not None and waited >= self.patience
        return out_of_patience or self.position.epoch >= self.config.train.epochs

    def _finish(self) -> dict[str, Any]:
        position = self.position
        best = self.checkpoints.restore(abstract(self.state), best=True)
        if best is None or best.position["epoch"] != position.best_epoch:
            raise ValueError(
                f"the best checkpoint, of epoch {position.best_epoch}, cannot be read any more "
                f"from {self.folder.checkpoints}: its result cannot be given. Train in a new "
                "--workdir."
            )
        self._warn_if_exploded()
        params = best.state.params
        result: dict[str, Any] = {
            "protocol": self.config.train.protocol,
            "split": "test",
            "eval": self.config.evaluation,
            "seed": self.config.train.seed,
            "epochs": position.epoch,
            "steps": self.step,
            "seconds": position.seconds,
            "compile_seconds": position.compile_seconds,
            "best_epoch": position.best_epoch,
        }
        if self.split == "test":
            result |= {"best": self.evaluator(params), "last": position.last}
        else:
            # One look at the test items, with the parameters that did best on validation.
            result |= {"validation": self.evaluator(params), "best": self.test_evaluator(params)}
        if processes.is_first():
            write_json(self.folder.result, result)
            runs = {self.config.name: self.folder.metrics}
            title = f"{self.config.name}: {self.split}, {report.conditions(self.config)}"
            without_model = self.task.baselines(self.split)
            criteria = self.evaluator.criteria
            report.draw_curves(
                runs, self.folder.curves, criteria, title=title, baselines=without_model
            )
        self.checkpoints.close()
        return result


class _StartedCall(NamedTuple):
    """A compiled call that was started."""

    group: Group
    first_step: int
    history: dict[str, Array]
