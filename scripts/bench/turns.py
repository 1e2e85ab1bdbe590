"""Measurements in several processes: they prepare side by side, and take turns on the devices.

`each`: many short measurements, whose processes stay. `one_by_one`: few long ones, each in a
process that ends with it. Preparing takes most of the time: it compiles, which may try algorithms
on the device, and computes what is expected. Nothing prepares while something measures. With
XLA_PYTHON_CLIENT_PREALLOCATE=false the device's memory is enough for all.
"""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.sharedctypes import Synchronized
from typing import Any


class Turns:
    """Many may prepare, or one may measure.

    Who waits to measure goes before who wants to prepare: the processes prepare, then measure one
    by one.
    """

    def __init__(self, context: SpawnContext):
        self._changed = context.Condition()
        self._preparing, self._waiting, self._measuring = (
            context.Value("i", 0, lock=False) for _ in range(3)
        )

    @contextlib.contextmanager
    def _counted(self, count: "Synchronized[int]") -> Iterator[None]:
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
                self._changed.wait_for(
                    lambda: not self._preparing.value and not self._measuring.value
                )
            finally:
                self._waiting.value -= 1
            with self._counted(self._measuring):
                yield


_turns: Turns | None = None


def _share(turns: Turns) -> None:
    global _turns
    _turns = turns


def preparing() -> AbstractContextManager[None]:
    """A context in which no other process of `each` measures."""
    return contextlib.nullcontext() if _turns is None else _turns.preparing()


def turn() -> AbstractContextManager[None]:
    """A context in which no other process of `each` measures or prepares."""
    return contextlib.nullcontext() if _turns is None else _turns.measuring()


def each[R](tasks: Sequence[Callable[[], R]], jobs: int) -> Iterator[tuple[int, R]]:
    """(number, result) of every task, as they come; in this process, or in `jobs` new ones."""
    if jobs <= 1:
        yield from ((number, task()) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_share, initargs=(Turns(context),)
    ) as pool:
        numbers = {pool.submit(task): number for number, task in enumerate(tasks)}
        for done in concurrent.futures.as_completed(numbers):
            yield numbers[done], done.result()


def one_by_one[R](
    tasks: Sequence[Callable[[], Callable[[], R]]], processes: bool = True
) -> Iterator[R | Exception]:
    """The result of what every task returns, in order; an exception is a result.

    A task prepares, and returns the function that measures. All prepare at the same time, each in a
    process of its own. Then one after another measures and ends: it has host and devices to itself,
    and what it took of the devices' memory is free for the next. Without `processes` all is done
    here, for work that is small.
    """
    if not processes:
        for task in tasks:
            work = _or_error(task)
            yield work if isinstance(work, Exception) else _or_error(work)
        return
    context = multiprocessing.get_context("spawn")
    started = []
    for task in tasks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_prepare_and_wait, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    prepared = [_received(pipe) for _, pipe in started]
    for error, (process, pipe) in zip(prepared, started, strict=True):
        if error is None:
            pipe.send(None)
        result = error or _received(pipe)
        process.join()
        yield result


def _prepare_and_wait[R](pipe: Connection, task: Callable[[], Callable[[], R]]) -> None:
    work = _or_error(task)
    if isinstance(work, Exception):
        pipe.send(work)
        return
    pipe.send(None)
    pipe.recv()
    pipe.send(_or_error(work))


def _or_error[R](function: Callable[[], R]) -> R | Exception:
    """What it returns, or its error, of a kind that goes through a pipe."""
    try:
        return function()
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended without an answer")
