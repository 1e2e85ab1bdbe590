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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from rich.console import Console

from ultra_hstu import optim, report, tasks
from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.config import Config
from ultra_hstu.data.feed import Feed, Group
from ultra_hstu.parallel import make_mesh, processes
from ultra_hstu.step import Steps, TrainState
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir, write_json

# epochs; used by the protocols with a validation part when train.patience is None
VALIDATED_PATIENCE = 10

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0  # of the epoch: the next one to train on
    loss_sum: float = 0.0  # over the epoch's batches so far
    best_epoch: int = 0
    # the evaluator's criteria say what it is; None: nothing was evaluated yet
    best_metric: float | None = None
    evaluated_epoch: int = 0  # the newest epoch that was evaluated, and what came out
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # spent training and evaluating, without compilation
    compile_seconds: float = 0.0  # over all starts


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); its state is saved."""


def run_steps(
    recipe: Steps, state: TrainState, feed: Feed, steps: Int[Array, ""]
) -> tuple[TrainState, dict[str, Float[Array, " S"]]]:
    """The first `steps` batches of a feed, one update each.

    The trip count is traced: a shorter last call does not compile again.
    """

    def body(i: jax.Array, carry: Any) -> Any:
        state, history = carry
        state, metrics = recipe.feed_step(state, feed, i)
        return state, {name: history[name].at[i].set(value) for name, value in metrics.items()}

    history = {
        name: jnp.zeros(recipe.config.train.steps_per_call) for name in ("loss", "grad_norm")
    }
    return jax.lax.fori_loop(0, steps, body, (state, history))


def train(
    config: Config,
    workdir: Path | str,
    *,
    console: Console | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `workdir`; returns its result, which `result.json`
    holds too.

    Args:
      task: the loaded data of this configuration, where several runs share it.

    Raises:
      ValueError: bad configuration or data, or a folder that belongs to another run.
      FloatingPointError: a loss that is not finite, with step, learning rate and gradient norm.
      OSError: a checkpoint that could not be written.
      Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    config.validate()
    tasks.check(config)
    console = (console or Console()) if processes.is_first() else Console(quiet=True)
    folder = Workdir(workdir)
    config = _claim(folder, config)
    try:
        task = tasks.load(config) if task is None else task.with_config(config)
        processes.require_same(
            "data set", task.interactions.fingerprint() if processes.several() else {}
        )
        processes.of_first(lambda: folder.claim_data(task.interactions))
        with jax.default_matmul_precision(config.train.matmul_precision):
            run = _Run(task, folder, console)
            try:
                return run.to_the_end()
            finally:
                run.checkpoints.let_go()
                if run.log is not None:
                    run.log.close()
    finally:
        folder.release()


def _claim(folder: Workdir, config: Config) -> Config:
    """Claims the folder for all processes, of which one writes in it; the configuration with its
    groups. Raises ValueError as `Workdir.claim`.
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
        with_groups = folder.with_groups(config)
        if config.parallel.data * config.parallel.context > 1:
            make_mesh(
                config.parallel.data, config.parallel.context
            )  # raises before the folder is this run's
        folder.claim(with_groups)
        return with_groups.parallel.batch_groups

    groups = processes.of_first(claim)
    seen = processes.of_all(folder.config.exists())
    if not all(seen):
        folder.release()
        raise ValueError(
            f"process {seen.index(False)} does not see {folder.config}, which process 0 has "
            "written: all processes must share --workdir"
        )
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, groups=groups))


class _Run:
    def __init__(self, task: Task, folder: Workdir, console: Console):
        self.task, self.config, self.folder, self.console = task, task.config, folder, console
        config = self.config.train
        self.loader = task.loader(
            "train", batch_users=self.config.data.batch_users, steps_per_call=config.steps_per_call
        )
        self.split = "test" if config.protocol == "published" else "validation"
        self.evaluator = task.evaluator(self.split)
        # Made now, so that data without test events is an error before training.
        self.test_evaluator = self.evaluator if self.split == "test" else task.evaluator("test")
        self.patience = config.patience or (
            None if config.protocol == "published" else VALIDATED_PATIENCE
        )
        self.checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        self.state = task.recipe.start(config.seed)
        self.position = Position()
        if (restored := self.checkpoints.restore(abstract(self.state))) is not None:
            step, self.state, position = restored
            self.position = Position(**position)
            if self.position.epoch > config.epochs:
                raise ValueError(
                    f"train.epochs={config.epochs}, but this run has trained {self.position.epoch} "
                    "epochs already: give at least as many"
                )
            self.checkpoints.drop_after(step)
            console.print(f"going on from step {step} (epoch {self.position.epoch + 1})")
        self.run_steps = self._compile()
        step = int(self.state.step)
        self.log = (
            report.MetricLog(folder.metrics, folder.tensorboard, resume_step=step)
            if processes.is_first()
            else None
        )

    def _compile(self) -> jax.stages.Compiled:
        """The training call, compiled for the shapes that all its calls have."""
        started = time.perf_counter()
        group = next(iter(self.loader.groups(self.loader.plan())))
        recipe = self.task.recipe
        out_shardings = (
            None
            if recipe.mesh is None
            else (recipe.shardings, NamedSharding(recipe.mesh, PartitionSpec()))
        )
        step = jax.jit(
            functools.partial(run_steps, recipe), donate_argnums=0, out_shardings=out_shardings
        )
        compiled = step.lower(self.state, group.feed, np.int32(group.steps)).compile()
        self.evaluator.compile(self.state.params)
        processes.meet()
        self.position.compile_seconds += time.perf_counter() - started
        return compiled

    def to_the_end(self) -> dict[str, Any]:
        with _stop_signals() as stop, report.progress_bar(self.console) as bar:
            line = bar.add_task("training", total=None, status="")
            while self.position.epoch < self.config.train.epochs and not self._out_of_patience():
                started = time.perf_counter()
                bar.update(
                    line, description=f"epoch {self.position.epoch + 1}/{self.config.train.epochs}"
                )
                record = self._train_epoch(stop, lambda **fields: bar.update(line, **fields))
                self.position.epoch += 1
                self.position.batch, self.position.loss_sum = 0, 0.0
                last_epoch = self.position.epoch == self.config.train.epochs
                metrics: dict[str, float] = {}
                if self.position.epoch % self.config.train.eval_every == 0 or last_epoch:
                    found = self.evaluator(self.state.params)
                    # Those of process 0, so that all decide alike about what follows from them.
                    metrics = self.position.last = processes.of_first(
                        functools.partial(dict, found)
                    )
                    self.position.evaluated_epoch = self.position.epoch
                    criteria = self.evaluator.criteria
                    if criteria.better(metrics[criteria.selection], self.position.best_metric):
                        self.position.best_metric, self.position.best_epoch = (
                            metrics[criteria.selection],
                            self.position.epoch,
                        )
                    shown = "  ".join(
                        f"{name} {metrics[name]:.4f}" for name in criteria.curves if name in metrics
                    )
                    bar.update(line, status=f"loss {record['loss']:.3f}  {shown}")
                seconds = time.perf_counter() - started
                self.position.seconds += seconds
                step = int(self.state.step)
                if self.log is not None:
                    self.log.write(
                        step,
                        {
                            "epoch": self.position.epoch,
                            "seconds": seconds,
                            "split": self.split,
                            **record,
                            **metrics,
                        },
                    )
                improved = self.position.best_epoch == self.position.epoch
                due = (
                    last_epoch
                    or self.position.epoch % self.config.train.checkpoint_every == 0
                    or self._out_of_patience()
                )
                cause = self._asked(stop)()
                if improved or due or cause:
                    self._save(best=improved)
                if cause:
                    self._interrupt(cause)
            self.checkpoints.wait()
        return self._finish()

    def _asked(self, stop: "_Stop") -> Callable[[], int]:
        """The signal that any of the processes was asked to stop by, or 0: all stop at the same
        step.
        """
        return processes.largest(stop.requested, self.task.recipe.mesh)

    def _interrupt(self, cause: int) -> None:
        self.checkpoints.wait()
        raise Interrupted(
            f"stopped by {signal.Signals(cause).name} at step {int(self.state.step)}, epoch "
            f"{self.position.epoch + 1}; the same command goes on from there"
        )

    def _train_epoch(self, stop: "_Stop", show: Any) -> dict[str, float]:
        position, schedule = self.position, optim.learning_rate(self.config.optim)
        plan = self.loader.plan(seed=self.config.train.seed, epoch=position.epoch)
        show(
            total=self.config.train.epochs * len(plan),
            completed=position.epoch * len(plan) + position.batch,
        )
        waited, grad_norm = 0.0, 0.0
        # the call before: read once the next is under way
        running: tuple[Group, int, dict[str, jax.Array]] | None = None

        def read(group: Group, first_step: int, history: dict[str, jax.Array]) -> None:
            nonlocal grad_norm
            losses, norms = (
                np.asarray(history["loss"])[: group.steps],
                np.asarray(history["grad_norm"])[: group.steps],
            )
            finite = np.isfinite(losses) & np.isfinite(norms)
            if not finite.all():
                bad = int(np.argmin(finite))
                self.checkpoints.wait()
                raise FloatingPointError(
                    f"the loss is {losses[bad]} at step {first_step + bad} (epoch "
                    f"{position.epoch + 1}, learning rate "
                    f"{float(schedule(first_step + bad)):g}, gradient norm {norms[bad]:g}). "
                    f"{self.checkpoints.last_good()}. "
                    "Lower optim.learning_rate or set optim.clip_norm, in a new --workdir."
                )
            position.loss_sum += float(np.sum(losses, dtype=np.float64))
            position.batch = group.first + group.steps
            grad_norm = float(norms[-1])
            show(completed=position.epoch * len(plan) + position.batch)

        groups = iter(self.loader.groups(plan, first=position.batch))
        step = int(self.state.step)
        while True:
            before = time.perf_counter()
            group = next(groups, None)
            waited += time.perf_counter() - before
            asked = self._asked(stop)
            if group is not None:
                self.state, history = self.run_steps(self.state, group.feed, np.int32(group.steps))
            if running is not None:
                read(*running)
            if group is None:
                break
            running = (group, step, history)
            step += group.steps
            if (cause := asked()) and group.first + group.steps < len(
                plan
            ):  # else the epoch is done: evaluate it first
                read(*running)
                self._save(best=False)
                self._interrupt(cause)
        return {
            "loss": position.loss_sum / len(plan),
            "grad_norm": grad_norm,
            "learning_rate": float(schedule(max(step - 1, 0))),
            "input_wait_seconds": waited,
        }

    def _save(self, *, best: bool) -> None:
        self.checkpoints.save(
            int(self.state.step), self.state, dataclasses.asdict(self.position), best=best
        )

    def _out_of_patience(self) -> bool:
        return (
            self.patience is not None
            and self.position.evaluated_epoch - self.position.best_epoch >= self.patience
        )

    def _finish(self) -> dict[str, Any]:
        best = self.checkpoints.restore(abstract(self.state), best=True)
        if best is None or best[2]["epoch"] != self.position.best_epoch:
            raise ValueError(
                f"the best checkpoint, of epoch {self.position.best_epoch}, cannot be read any "
                f"more from {self.folder.checkpoints}: "
                "its result cannot be given. Train in a new --workdir."
            )
        params = best[1].params
        result: dict[str, Any] = {
            "protocol": self.config.train.protocol,
            "split": "test",
            "seed": self.config.train.seed,
            "epochs": self.position.epoch,
            "steps": int(self.state.step),
            "seconds": self.position.seconds,
            "compile_seconds": self.position.compile_seconds,
            "best_epoch": self.position.best_epoch,
            "best": self.evaluator(params),
            "last": self.position.last,
        }
        if self.split != "test":
            # One look at the test items, with the parameters that did best on the validation items.
            result |= {
                "validation": result.pop("best"),
                "best": self.test_evaluator(params),
            }
            result.pop("last")
        if processes.is_first():
            write_json(self.folder.result, result)
            report.draw_curves(
                {self.config.name: self.folder.metrics}, self.folder.curves, self.evaluator.criteria
            )
        self.checkpoints.close()
        return result


class _Stop:
    requested: int = 0  # number of the signal


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT ask for a stop after the call in flight; a second one ends the process at
    once.
    """
    stop = _Stop()
    previous: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop.requested = number
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            previous[number] = signal.signal(number, ask)
    except ValueError:
        pass  # not in the main thread: the caller's signals are its own
    try:
        yield stop
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)
