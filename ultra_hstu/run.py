"""A run at work: epochs of compiled calls, evaluation, checkpoints, and its result."""

import dataclasses
import functools
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array
from rich.console import Console

from ultra_hstu import optim, progress, report, signals
from ultra_hstu.checkpoint import Checkpoints, Position, abstract
from ultra_hstu.compiling import Program, compile_run
from ultra_hstu.criteria import Metrics
from ultra_hstu.data.feed import Group
from ultra_hstu.data.packing import Plan
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.initial import parameters_of
from ultra_hstu.json_files import write_json
from ultra_hstu.parallel import processes
from ultra_hstu.step import HISTORY, TrainState, largest_weight
from ultra_hstu.task import Task
from ultra_hstu.trackers import Tracker
from ultra_hstu.workdir import Workdir

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


class Run:
    # Whether nothing was trained in this place before, and whether parameters are initial ones.
    is_first = starts = True
    measured_on = "test"  # what the best epoch is measured on in the end; of a trial, validation

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
        self._begin(task.recipe.start(config.seed))
        self.log: report.MetricLog | None = None
        if processes.is_first():
            settings = dataclasses.asdict(self.config)
            self.log = report.MetricLog(
                folder.metrics, folder.tensorboard, settings, trackers, resume_step=self.step
            )

    def _begin(self, state: TrainState) -> None:
        """Goes on from the newest checkpoint, or else begins with a state.

        Where `train.init_from` names a run, its parameters take the place of the state's.
        """
        config, folder = self.config.train, self.folder
        self.schedule = optim.learning_rate(self.config.optim)
        self.checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        self.state, self.position = state, Position()
        started = time.perf_counter()
        if (restored := self.checkpoints.restore(abstract(self.state))) is not None:
            step, self.state, position = restored
            self.position = Position.of(position, f"checkpoint {folder.checkpoints / str(step)}")
            if self.position.epoch > config.epochs and self.config.windows.number is None:
                raise ValueError(
                    f"train.epochs={config.epochs}, but this run has trained "
                    f"{self.position.epoch} epochs already: give at least as many"
                )
            self.checkpoints.drop_after(step)
        else:
            if config.init_from is not None and self.starts:
                params, origin = parameters_of(config.init_from, self.task, self.console)
                self.state = dataclasses.replace(self.state, params=params)
                self.position.init_from = origin
            if self.is_first:
                self.state = self.checkpoints.try_out(self.state)
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - started  # reading it back takes as long

    @property
    def step(self) -> int:
        return int(self.state.step)

    def _compile(self, profile: Path | None = None) -> Program:
        """The training call, and the evaluation; `profile`: the folder for a trace."""
        started = time.perf_counter()
        compiled = compile_run(
            self.task, self.loader, self._evaluator(), self.state, self.console, profile=profile
        )
        self.position.compile_seconds += time.perf_counter() - started
        return compiled

    def _evaluator(self) -> Evaluator | None:
        """What is compiled beside the training call."""
        return self.evaluator

    def to_the_end(self, *, profile: bool = False) -> dict[str, Any]:
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
            self.run_steps = self._compile(self.folder.profile if profile else None)
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
                metrics: Metrics = {}
                shown = f"loss {record['loss']:.3f}"
                if self._evaluation_due():
                    epochs.doing(f"evaluating on {self.split}")
                    metrics, found = self._evaluate()
                    shown += f"  {found}"
                seconds = time.perf_counter() - started
                position.seconds += seconds
                if self.log is not None:
                    head = {"epoch": position.epoch, "seconds": seconds, "split": self.split}
                    self.log.write(self.step, head | record | metrics)
                improved = position.best_epoch == position.epoch
                cause = self._stop_signal(stop)()
                if improved or cause or self._save_due():
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

    def _evaluation_due(self) -> bool:
        """Whether the epoch that ended is evaluated."""
        config, epoch = self.config.train, self.position.epoch
        return epoch % config.eval_every == 0 or epoch == config.epochs or self._all_steps()

    def _save_due(self) -> bool:
        """Whether a checkpoint is written after the epoch that ended."""
        return self.position.epoch % self.config.train.checkpoint_every == 0 or self._ended()

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
        plan = self._plan()
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

    def _plan(self) -> Plan:
        """The batches of the epoch, as many of them as `train.steps` leaves."""
        plan = self.loader.plan(seed=self.config.train.seed, epoch=self.position.epoch)
        if (steps := self.config.train.steps) is None:
            return plan
        return plan.cut(steps - (self.step - self.position.batch))

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
        all_epochs = self.position.epoch >= self.config.train.epochs
        return out_of_patience or all_epochs or self._all_steps()

    def _all_steps(self) -> bool:
        return self.config.train.steps is not None and self.step >= self.config.train.steps

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
            "split": self.measured_on,
            "eval": self.config.evaluation,
            "seed": self.config.train.seed,
            "epochs": position.epoch,
            "steps": self.step,
            "seconds": position.seconds,
            "compile_seconds": position.compile_seconds,
            "best_epoch": position.best_epoch,
        }
        if position.init_from:
            result["init_from"] = position.init_from
        if self.split == "test":
            result |= {"best": self.evaluator(params), "last": position.last}
        elif self.measured_on == self.split:  # a trial, which leaves the test items alone
            result |= {"best": self.evaluator(params)}
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
