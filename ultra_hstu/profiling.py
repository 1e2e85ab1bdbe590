"""Where the time of a step goes: a trace of some steps, and its kernels as tables.

XLA names a kernel after its number in a program (`input_reduce_fusion_12`). The text of the
compiled program says what is inside of it and which function of ours it comes from, so the tables
add a kind and that function. On a CPU the operations of a program stand for kernels.
"""

import collections
import contextlib
import dataclasses
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from ultra_hstu import progress
from ultra_hstu.data.feed import Feed
from ultra_hstu.instructions import MOSAIC, NUMBERS, Instruction, instructions, kind_of
from ultra_hstu.step import Carry, TrainState

SHOWN = 16  # kernels of a table; the others are one line
IDLE = "nothing runs"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Kernels of one kind and name, without their numbers, that come from one function.

    Attributes:
      calls, seconds: a step.
    """

    kind: str
    name: str
    source: str
    calls: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the first device did in a step.

    Attributes:
      steps: that were traced; all numbers are means over them.
      seconds: of a step, by the clock.
      busy: seconds of a step in which a kernel ran.
      kernels: the longest first.
    """

    steps: int
    seconds: float
    busy: float
    kernels: tuple[Kernel, ...]

    def kinds(self) -> dict[str, tuple[float, float]]:
        """Kernels and seconds of a step by kind, the longest first; `IDLE` is last."""
        sums = collections.defaultdict[str, list[float]](lambda: [0.0, 0.0])
        for kernel in self.kernels:
            sums[kernel.kind][0] += kernel.calls
            sums[kernel.kind][1] += kernel.seconds
        ordered = sorted(sums.items(), key=lambda item: -item[1][1])
        idle = max(self.seconds - self.busy, 0.0)
        return {kind: (calls, seconds) for kind, (calls, seconds) in ordered} | {IDLE: (0.0, idle)}

    def to_json(self, shown: int = SHOWN) -> dict[str, Any]:
        """For a record: milliseconds of a step by kind, and the `shown` longest kernels."""
        kinds = {
            kind: {"ms": 1e3 * seconds, "share": seconds / self.seconds, "kernels": calls}
            for kind, (calls, seconds) in self.kinds().items()
        }
        longest = [
            {name: value for name, value in vars(kernel).items() if name != "seconds"}
            | {"ms": 1e3 * kernel.seconds}
            for kernel in self.kernels[:shown]
        ]
        return {
            "step_ms": 1e3 * self.seconds,
            "busy_ms": 1e3 * self.busy,
            "kinds": kinds,
            "longest": longest,
        }

    def tables(self, what: str = "a step") -> tuple[Table, Table]:
        """Kinds with their shares of the time, and the longest kernels."""
        title = f"{what}: {1e3 * self.seconds:.2f} ms, mean of {self.steps}"
        kinds = Table("kind", *_NUMBERS_OF, title=title, box=rich.box.SIMPLE)
        for kind, (calls, seconds) in self.kinds().items():
            kinds.add_row(kind, *self._cells(calls, seconds))
        longest = Table("kind", "kernel", "from", *_NUMBERS_OF, box=rich.box.SIMPLE)
        for kernel in self.kernels[:SHOWN]:
            names = (kernel.kind, kernel.name, kernel.source)
            longest.add_row(*names, *self._cells(kernel.calls, kernel.seconds))
        if rest := self.kernels[SHOWN:]:
            sums = (sum(one.calls for one in rest), sum(one.seconds for one in rest))
            longest.add_row("", f"{len(rest)} others", "", *self._cells(*sums))
        for table in (kinds, longest):
            for column in table.columns[-len(_NUMBERS_OF) :]:
                column.justify = "right"
        return kinds, longest

    def _cells(self, calls: float, seconds: float) -> tuple[str, str, str]:
        return f"{calls:.4g}", f"{1e3 * seconds:.3f}", f"{seconds / self.seconds:.1%}"


_NUMBERS_OF = ("times a step", "ms a step", "share")


@contextlib.contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Writes a trace of the block, which ends when its work is done, for TensorBoard and `read`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def profiled[R](
    run: Callable[[], R],
    programs: Iterable[jax.stages.Compiled],
    *,
    steps: int = 1,
    folder: Path | None = None,
) -> tuple[Profile, R]:
    """Traces `run`, which takes so many steps; the profile, and the result.

    Args:
      run: calls compiled programs. What ran before is done, and what it needs is on the device.
      programs: those.
      folder: of the trace; None: it is not kept.

    Raises:
      ValueError: nothing was traced.
    """
    with contextlib.ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with tracing(kept):
            started = time.perf_counter()
            result = jax.block_until_ready(run())
            seconds = time.perf_counter() - started
        texts = [program.as_text() or "" for program in programs]
        return read(kept, texts, seconds=seconds, steps=steps), result


@dataclasses.dataclass(frozen=True)
class _Event:
    name: str
    instruction: str  # "" where the trace does not say
    start: float
    seconds: float


def read(folder: Path, texts: Sequence[str], *, seconds: float, steps: int) -> Profile:
    """The newest trace in a folder.

    Args:
      texts: of the compiled programs that ran.
      seconds: of the traced steps together, by the clock.

    Raises:
      ValueError: no trace, or no kernel in it.
    """
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    empty: tuple[list[list[_Event]], bool] = [], False
    lines, nested = _device_lines(ProfileData.from_file(str(files[-1]))) if files else empty
    if not any(lines):
        raise ValueError(f"no kernel was traced in {folder}: the profiler of this device is off")
    known: dict[str, Instruction] = {}
    for text in texts:
        known |= instructions(text)
    known |= {re.sub(r"[.\-]", "_", name): one for name, one in known.items()}  # as kernels
    sums = collections.defaultdict[tuple[str, str, str], list[float]](lambda: [0.0, 0.0])
    spans = []
    for line in lines:
        for event, own in _own_seconds(line) if nested else [(one, one.seconds) for one in line]:
            spans.append((event.start, event.start + event.seconds))
            instruction = known.get(event.instruction) or known.get(event.name)
            instruction = instruction or Instruction(frozenset())
            key = (
                kind_of(event.name, instruction),
                NUMBERS.sub("", event.name).removesuffix(MOSAIC),
                ", ".join(filter(None, [instruction.source, "backward" * instruction.backward])),
            )
            sums[key][0] += 1
            sums[key][1] += own
    kernels = [Kernel(*key, calls / steps, own / steps) for key, (calls, own) in sums.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(steps, seconds / steps, _covered(spans) / steps, tuple(kernels))


def _device_lines(data: ProfileData) -> tuple[list[list[_Event]], bool]:
    """What the first device of this process did: a list of events for each queue or thread.

    And whether they are nested: on a CPU a loop encloses its body, a GPU's queue has kernels alone.
    """
    planes = sorted(data.planes, key=lambda plane: plane.name)
    of_device = [plane for plane in planes if plane.name.startswith("/device:")][:1]
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the types of this module
        for plane in of_device or [plane for plane in planes if plane.name == "/host:CPU"]:
            for line in plane.lines:
                if of_device and not line.name.startswith("Stream"):
                    continue  # sums over kernels
                events = []
                for event in line.events:
                    stats = dict(event.stats)
                    if of_device or ("hlo_op" in stats and not stats.get("device_ordinal", 0)):
                        instruction = str(stats.get("hlo_op", ""))
                        start, seconds = event.start_ns / 1e9, event.duration_ns / 1e9
                        events.append(_Event(event.name, instruction, start, seconds))
                lines.append(events)
    return lines, not of_device


def _own_seconds(events: list[_Event]) -> Iterator[tuple[_Event, float]]:
    """Every event with its seconds outside of those that it encloses, as a loop does its body."""
    open_events: list[tuple[_Event, list[float]]] = []
    own = []
    for event in sorted(events, key=lambda event: (event.start, -event.seconds)):
        while open_events and event.start >= open_events[-1][0].start + open_events[-1][0].seconds:
            open_events.pop()
        if open_events:
            open_events[-1][1][0] -= event.seconds
        left = [event.seconds]
        own.append((event, left))
        open_events.append((event, left))
    for event, left in own:
        yield event, max(left[0], 0.0)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of stretches."""
    start_n, end_n = np.array(sorted(spans)).T
    reached_n = np.maximum.accumulate(end_n)
    gaps_n = np.maximum(start_n[1:] - reached_n[:-1], 0)
    return float(reached_n[-1] - start_n[0] - gaps_n.sum())


class ProfiledCall:
    """A compiled training call that is traced once, and the tables are printed then.

    Args:
      folder: of the trace.
      warm: calls before that one.
    """

    def __init__(self, compiled: jax.stages.Compiled, folder: Path, console: Console, *, warm: int):
        self.compiled, self.folder, self.console, self.warm = compiled, folder, console, warm

    def __call__(self, state: TrainState, feed: Feed, steps: np.int32) -> Carry:
        self.warm -= 1
        if self.warm != -1:
            return self.compiled(state, feed, steps)
        state, feed = jax.block_until_ready((state, feed))
        profile, result = profiled(
            lambda: self.compiled(state, feed, steps),
            [self.compiled],
            steps=int(steps),
            folder=self.folder,
        )
        for table in profile.tables("a training step"):
            self.console.print(table)
        progress.line(self.console, "profile", f"{self.folder}, for TensorBoard's profile tab")
        return result
