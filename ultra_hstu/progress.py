"""What a run says while it works: a line for all that is done, and signs of life in between.

A terminal shows a bar or a clock meanwhile. A pipe or a log gets the same lines, and one more every
few seconds where nothing else was said.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from jaxtyping import PyTree
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from kernels.dispatch import Choice
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions

FIRST_S, REPEAT_S = 2.0, 6.0  # until a pipe reads that work goes on, and until it reads so again
LABEL = 9  # characters in front of a line
TRAINING = "training"
LONG_EPOCH_S = 10.0  # from here on the time of the first epoch is estimated


def line(console: Console, label: str, text: str) -> None:
    """Prints one line that stays: `label` in a column of its own, and text."""
    console.print(f"{label:<{LABEL}} {text}", markup=False, highlight=False, soft_wrap=True)


def counts(data: Interactions) -> str:
    return f"{data.num_users:,} users, {data.num_items:,} items, {data.num_events:,} events"


def model(config: Config, params: PyTree, choices: Iterable[Choice]) -> str:
    """The kind of model, its number of parameters, and which implementations its ops have."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    ran = sorted({f"{choice.op} {choice.implementation}" for choice in choices})
    return ", ".join([config.model.kind, f"{parameters:,} parameters", *ran])


@contextlib.contextmanager
def waiting(
    console: Console, label: str, what: str, *, clock: bool = True
) -> Iterator[Callable[[str], None]]:
    """Says that `what` is done while the block does it, and afterwards what came of it.

    The block calls the function that it gets with the text of that line, to which the seconds are
    added. Without a call there is no such line.

    Args:
      clock: a terminal shows a running clock; not where the block writes to it by itself.
    """
    started, results = time.perf_counter(), list[str]()
    with _shown(console, label, what, clock):
        yield results.append
    for text in results:
        line(console, label, f"{text} ({time.perf_counter() - started:.1f} s)")


@contextlib.contextmanager
def _shown(console: Console, label: str, what: str, clock: bool) -> Iterator[None]:
    if console.quiet:
        yield
    elif console.is_terminal and clock:
        with _bar(console, label, SpinnerColumn()) as bar:
            bar.add_task(what, total=None)
            yield
    else:
        with _Ticking(console, label, lambda: what):
            yield


def _bar(console: Console, label: str, column: ProgressColumn) -> Progress:
    return Progress(
        TextColumn(f"{label:<{LABEL}} {{task.description}}"),
        column,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # What the console does not show must not end up there: results may go to a file.
        redirect_stdout=not console.stderr,
    )


class _Ticking:
    """Prints `status` and the seconds so far, after FIRST_S and then every REPEAT_S.

    `said` puts the next one off. Raises OSError, in the end or there, where it could not print.
    """

    def __init__(self, console: Console, label: str, status: Callable[[], str]):
        self.console, self.label, self.status = console, label, status
        self._ended = threading.Event()
        self._started = time.perf_counter()
        self._next = self._started + FIRST_S
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Ticking":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def said(self) -> None:
        if self._error is not None:
            raise self._error
        self._next = time.perf_counter() + REPEAT_S

    def _tick(self) -> None:
        while not self._ended.wait(max(self._next - time.perf_counter(), 0.05)):
            if (now := time.perf_counter()) >= self._next:
                self._next = now + REPEAT_S
                text = f"{self.status()}, {duration(now - self._started)} so far"
                try:
                    line(self.console, self.label, text)
                except OSError as error:
                    self._error = error
                    return


class Epochs:
    """The lines and the bar of a training run; a context, within which epochs pass.

    Args:
      last: the number of the last epoch.
      save_seconds: what saving the state takes.
      at_most: training may stop before that.
    """

    def __init__(self, console: Console, last: int, save_seconds: float, *, at_most: bool):
        self.console, self.last, self.save_seconds = console, last, save_seconds
        self._most = "at most " if at_most else ""
        self._bar: Progress | None = None
        self._ticking: _Ticking | None = None
        self._stack = contextlib.ExitStack()
        self._epoch, self._steps, self._done, self._doing = 0, 0, 0, ""
        self._spans: list[float] = []  # seconds of the epochs of this start
        self._estimated = False
        self._call_s: float | None = None  # of the newest call, and of the newest evaluation
        self._evaluation_s: float | None = None
        self._began = self._read = time.perf_counter()
        self._begun_at = 0

    def __enter__(self) -> "Epochs":
        if self.console.quiet:
            return self
        if self.console.is_terminal:
            self._bar = self._stack.enter_context(_bar(self.console, "", BarColumn()))
            self._bar.add_task("")
        else:
            self._ticking = self._stack.enter_context(_Ticking(self.console, "", self._status))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, epoch: int, steps: int, done: int) -> None:
        """Epoch `epoch`, counted from 1, begins or goes on behind the first `done` of its steps."""
        self._epoch, self._steps, self._done, self._begun_at = epoch, steps, done, done
        self._doing = TRAINING
        self._began = self._read = time.perf_counter()
        self._show()

    def reached(self, done: int) -> None:
        """So many steps of the epoch are done."""
        now = time.perf_counter()
        self._call_s, self._done, self._read = now - self._read, done, now
        epoch_s = self._epoch_s()
        if not self._estimated and epoch_s is not None:
            self._estimated = True
            if epoch_s >= LONG_EPOCH_S:
                whole = duration(epoch_s * (self.last - self._epoch + 1))
                self._say(
                    f"about {duration(epoch_s)} an epoch without evaluation, {self._most}{whole} "
                    "for all that are left"
                )
        self._show()

    def doing(self, what: str) -> None:
        """What is done after the steps of an epoch."""
        self._doing, self._read = what, time.perf_counter()
        self._show()

    def promise(self) -> str:
        """What follows a signal at this time, and how long it takes."""
        what = "the call" if self._doing == TRAINING else "the evaluation"
        seconds = self._call_s if self._doing == TRAINING else self._evaluation_s
        about = "" if seconds is None else f", in about {duration(seconds + self.save_seconds)}"
        return f"stopping: {what} that is under way ends, and the state is saved{about}"

    def end(self, text: str) -> None:
        """The line of an epoch, with its seconds and what time is left."""
        now = time.perf_counter()
        seconds = now - self._began
        if self._doing != TRAINING:
            self._evaluation_s = now - self._read
        if self._begun_at == 0:
            self._spans.append(seconds)
        left = self.last - self._epoch
        spans = self._spans or [seconds]
        left_s = sum(spans) / len(spans) * left
        rest = f", {self._most}{duration(left_s)} left" if left else ""
        self._say(f"{text}  {duration(seconds)}{rest}", f"{self._epoch}/{self.last}")

    def _say(self, text: str, number: str = "") -> None:
        line(self.console, "epoch", f"{number or f'{self._epoch}/{self.last}':<8} {text}")
        if self._ticking is not None:
            self._ticking.said()

    def _epoch_s(self) -> float | None:
        """Seconds of an epoch's steps, by those that are done; None: none is."""
        done = self._done - self._begun_at
        return (self._read - self._began) * self._steps / done if done > 0 else None

    def _status(self) -> str:
        text = f"epoch {self._epoch}/{self.last}: {self._doing}"
        if self._doing == TRAINING:
            text += f", {self._done:,} of {self._steps:,} steps"
            if (epoch_s := self._epoch_s()) is not None:
                left_s = epoch_s * (self._steps - self._done) / max(self._steps, 1)
                text += f", {duration(left_s)} left of the epoch"
        return text

    def _show(self) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(
                task, description=self._status(), completed=self._done, total=self._steps
            )


def duration(seconds: float) -> str:
    """A length of time in words: seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
