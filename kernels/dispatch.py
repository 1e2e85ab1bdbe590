"""Chooses an implementation of an op by name, or in order; remembers which one ran."""

import contextlib
import contextvars
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Choice(NamedTuple):
    op: str
    implementation: str


_records: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar(
    "records", default=()
)


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collects the choices made inside the block. Choices are made while tracing: a call that `jit` has cached makes none."""
    choices: list[Choice] = []
    token = _records.set((*_records.get(), choices))
    try:
        yield choices
    finally:
        _records.reset(token)


def installed(modules: Mapping[str, str]) -> dict[str, str]:
    """Those of the named modules whose file exists; none is imported."""
    return {
        name: module
        for name, module in modules.items()
        if importlib.util.find_spec(module) is not None
    }


def call(
    op: str,
    modules: Mapping[str, str],
    order: Sequence[str],
    implementation: str | Sequence[str] | None,
    run: Callable[[Any], Any],
) -> Any:
    """Runs `run(module)` with the first implementation that can.

    Args:
      op: for messages and records.
      modules: implementation names and the modules that hold them, imported at first use.
      order: what `implementation=None` tries.
      implementation: a name runs that implementation or raises what it raises; a sequence replaces `order`; None takes `order`.
      run: called with the module; NotImplementedError, and nothing else, moves on to the next.

    Raises:
      ValueError: a name that does not exist.
      NotImplementedError: none fits; the message has every reason.
    """
    named = isinstance(implementation, str)
    names = (
        [implementation]
        if isinstance(implementation, str)
        else list(order if implementation is None else implementation)
    )
    if not names:
        raise ValueError(
            f"{op}: implementation is an empty sequence; name at least one of {', '.join(modules)}"
        )
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{op}: no implementation is called {name!r}; there are {', '.join(modules)}"
            )
    reasons = []
    for name in names:
        try:
            result = run(importlib.import_module(modules[name]))
        except NotImplementedError as error:
            if named:
                raise
            reasons.append(f"  {name}: {error}")
            continue
        for choices in _records.get():
            choices.append(Choice(op, name))
        return result
    raise NotImplementedError(f"{op}: no implementation fits:\n" + "\n".join(reasons))
