"""Chooses an implementation of an op by name, or in order; remembers which one ran."""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

from kernels import device


class Choice(NamedTuple):
    op: str
    implementation: str


_records: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar(
    "records", default=()
)


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collects the choices made inside the block.

    Choices are made while tracing: a call that `jit` has cached makes none.
    """
    choices: list[Choice] = []
    token = _records.set((*_records.get(), choices))
    try:
        yield choices
    finally:
        _records.reset(token)


@dataclasses.dataclass(frozen=True)
class Op[Spec]:
    """An operation and its implementations.

    An implementation is a module. `unsupported(spec)` says why it cannot take the calls that a spec
    describes, or None; other functions of the module are the op's own business.

    Attributes:
      name: for messages and records.
      modules: implementation names and the modules that hold them, imported at first use.
      order: what `implementation=None` tries, by platform; platforms not named take `xla`.
    """

    name: str
    modules: Mapping[str, str]
    order: Mapping[str, Sequence[str]]

    def call[R](
        self,
        implementation: str | Sequence[str] | None,
        spec: Spec,
        run: Callable[[ModuleType], R],
    ) -> R:
        """Runs `run(module)` with the first implementation that can.

        Args:
          implementation: a name runs that implementation or raises its reason; a sequence is tried
            in order; None takes the order of the platform.
          spec: what the implementations decide by.
          run: NotImplementedError, and nothing else, moves on to the next implementation.

        Raises:
          ValueError: a name that does not exist.
          NotImplementedError: none fits; the message has every reason.
        """
        reasons = []
        for name in self._candidates(implementation):
            module = importlib.import_module(self.modules[name])
            try:
                reason = module.unsupported(spec)
                if reason is not None:
                    raise NotImplementedError(reason)
                result = run(module)
            except NotImplementedError as error:
                if isinstance(implementation, str):
                    raise
                reasons.append(f"  {name}: {error}")
                continue
            for choices in _records.get():
                choices.append(Choice(self.name, name))
            return result
        raise NotImplementedError(f"{self.name}: no implementation fits:\n" + "\n".join(reasons))

    def first_supported(
        self, implementation: str | Sequence[str] | None, spec: Spec
    ) -> ModuleType | None:
        """The module that `call` would run first, if any can."""
        for name in self._candidates(implementation):
            module = importlib.import_module(self.modules[name])
            if module.unsupported(spec) is None:
                return module
        return None

    def _candidates(self, implementation: str | Sequence[str] | None) -> Sequence[str]:
        if implementation is None:
            return self.order.get(device.current().platform, ("xla",))
        names = [implementation] if isinstance(implementation, str) else implementation
        known = ", ".join(self.modules)
        if not names:
            raise ValueError(
                f"{self.name}: implementation is an empty sequence; name at least one of {known}"
            )
        for name in names:
            if name not in self.modules:
                raise ValueError(
                    f"{self.name}: no implementation is called {name!r}; there are {known}"
                )
        return names
