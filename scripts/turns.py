"""Measurements in several processes: they compile side by side, which takes most of the time, and take turns on the device.

With XLA_PYTHON_CLIENT_PREALLOCATE=false, so that the device's memory is enough for all, and XLA_FLAGS=--xla_gpu_autotune_level=0, so that compiling
leaves the device alone; what XLA itself does with matrix products, the implementation `xla` then, is not at its best under that flag.
"""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_turn: Any = contextlib.nullcontext()


def _share(lock: Any) -> None:
    global _turn
    _turn = lock


def turn() -> Any:
    """A context in which no other process of `each` measures."""
    return _turn


def each(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of `function(*task)` for every task, as they come; with one job in this process, else in `jobs` new ones."""
    if jobs <= 1:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    with concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=_share, initargs=(lock,)) as pool:
        numbers = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
        for done in concurrent.futures.as_completed(numbers):
            yield numbers[done], done.result()
