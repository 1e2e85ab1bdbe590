"""Measurements in several processes: they prepare side by side, which takes most of the time, and take turns on the devices.

`each`: many short measurements, whose processes stay. `one_by_one`: few long ones, each in a process that ends with it. What prepares (compiles, which may try algorithms on the device; computes what is expected) and what measures never run at the same time. With
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
        self._preparing, self._waiting, self._measuring = (
            context.Value("i", 0, lock=False) for _ in range(3)
        )

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


def preparing() -> Any:
    """A context in which no other process of `each` measures."""
    return contextlib.nullcontext() if _turns is None else _turns.preparing()


def turn() -> Any:
    """A context in which no other process of `each` measures or prepares."""
    return contextlib.nullcontext() if _turns is None else _turns.measuring()


def each(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[int, Any]]:
    """(number, result) of `function(*task)` for every task, as they come; with one job in this process, else in `jobs` new ones."""
    if jobs <= 1:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_share, initargs=(Turns(context),)
    ) as pool:
        numbers = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
        for done in concurrent.futures.as_completed(numbers):
            yield numbers[done], done.result()


Prepare = Callable[..., Callable[[], Any]]


def one_by_one(
    tasks: Sequence[tuple[Prepare, tuple[Any, ...]]], processes: bool = True
) -> Iterator[Any]:
    """The result of `prepare(*arguments)()` for every (prepare, arguments), in order; an exception is a result.

    All prepare at the same time, each in a process of its own. Then one after another does its work and ends: it has host and devices to itself, and
    what it took of the devices' memory is free for the next. Without `processes` all is done here, for work that is small.
    """
    if not processes:
        for prepare, arguments in tasks:
            work = _or_error(prepare, *arguments)
            yield work if isinstance(work, Exception) else _or_error(work)
        return
    context = multiprocessing.get_context("spawn")
    started = []
    for task in tasks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_prepare_and_wait, args=(theirs, *task), daemon=True)
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


def _prepare_and_wait(pipe: Any, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    work = _or_error(prepare, *arguments)
    if isinstance(work, Exception):
        pipe.send(work)
        return
    pipe.send(None)
    pipe.recv()
    pipe.send(_or_error(work))


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or its error, of a kind that goes through a pipe."""
    try:
        return function(*arguments)
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended without an answer")
