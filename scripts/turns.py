"""Measurements in several processes: they prepare side by side, which takes most of the time, and take turns on the device.

What prepares (compiles, which may try algorithms on the device; computes what is expected) and what measures never run at the same time. With
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that the device's memory is enough for all.
"""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Turns:
    """Many may prepare, or one may measure. Who waits to measure goes before who wants to prepare: the processes prepare, then measure one by one."""

    def __init__(self, context: Any):
        self._changed = context.Condition()
        self._preparing, self._waiting, self._measuring = (context.Value("i", 0, lock=False) for _ in range(3))

    @contextlib.contextmanager
    def _counted(self, count: Any) -> Iterator[None]:
        count.value += 1
        try:
            with self._released():
                yield
        finally:
            count.value -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting.value and not self._measuring.value)
            with self._counted(self._preparing):
                yield

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        with self._changed:
            self._waiting.value += 1
            try:
                self._changed.wait_for(lambda: not self._preparing.value and not self._measuring.value)
            finally:
                self._waiting.value -= 1
            with self._counted(self._measuring):
                yield


_turns: Turns | None = None


def _share(turns: Turns) -> None:
    global _turns
    _turns = turns


def preparing() -> Any:
    """A context in which no other process of `each` measures."""
    return contextlib.nullcontext() if _turns is None else _turns.preparing()


def turn() -> Any:
    """A context in which no other process of `each` measures or prepares."""
    return contextlib.nullcontext() if _turns is None else _turns.measuring()


def each(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of `function(*task)` for every task, as they come; with one job in this process, else in `jobs` new ones."""
    if jobs <= 1:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=_share, initargs=(Turns(context),)) as pool:
        numbers = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
        for done in concurrent.futures.as_completed(numbers):
            yield numbers[done], done.result()
