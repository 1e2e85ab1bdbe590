"""SIGINT and SIGTERM, acknowledged at once, whatever the main thread is doing.

Python calls its handlers between two instructions of the main thread: never while XLA compiles or a
compiled call runs. So the interpreter writes the number of a signal to a pipe (its wake-up
descriptor), and a thread reads it there.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 5.0  # for what removes its temporary files, where there is nothing to save
NOTHING = f"stopping; nothing has to be saved, and it takes {GRACE_S:.0f} s at most"
NEW_LINE = "\r\x1b[K\x1b[?25h"  # on a terminal: in place of a bar, with the cursor that it hides


class Stop:
    """Whether a stop was asked for."""

    requested: int = 0  # number of the first signal


class Watch(Stop):
    """The signals of this process, until `restore`.

    Args:
      leaves: this is the process of a command. It ends within seconds where nothing was promised
        (`stopping`), and at once at the second signal. Otherwise the second signal is for the
        handlers that were there before.

    Raises:
      ValueError: outside the main thread.
    """

    def __init__(self, *, leaves: bool):
        self.leaves = leaves
        self.promise: Callable[[], str] | None = None
        self.acknowledged = threading.Event()
        self._previous: dict[int, Any] = {}
        for number in NUMBERS:
            self._previous[number] = signal.signal(number, self._handle)
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """Gives the signals back to the handlers that were there before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """In the main thread, as soon as that comes to it."""
        self.requested = self.requested or number
        if not self.leaves:
            signal.signal(number, self._previous[number])
        elif self.promise is None:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = self._next(None, 0)
        if not first:
            return
        self.requested = first
        promised = self.promise() if self.promise else None
        name = signal.Signals(first).name
        _say(f"{name}: {promised or NOTHING}. Once more: at once, without saving")
        self.acknowledged.set()
        if self.leaves and (last := self._next(None if promised else GRACE_S, first)):
            if promised:
                _say("left without saving; the same command goes on from the last checkpoint")
            os._exit(128 + last)

    def _next(self, seconds: float | None, late: int) -> int:
        """Number of the next signal; `late` where none comes in time, and 0 after `restore`."""
        if not select.select([self._read_end], [], [], seconds)[0]:
            return late
        return next(iter(os.read(self._read_end, 1)), 0)


_of_command: Watch | None = None


def watch() -> Watch:
    """Watches for the whole process, which is a command's; again, it returns the same."""
    global _of_command
    if _of_command is None:
        _of_command = Watch(leaves=True)
        os.register_at_fork(after_in_child=_forget)
    return _of_command


def leave_to_others() -> None:
    """Ends what `watch` began, for a command with handlers of its own."""
    global _of_command
    if _of_command is not None:
        _of_command.restore()
        _of_command = None


def _forget() -> None:
    """In a forked child: its signals are not the parent's."""
    global _of_command
    if _of_command is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _of_command = None


@contextlib.contextmanager
def stopping(promise: Callable[[], str]) -> Iterator[Stop]:
    """A block that stops by itself soon after a stop was asked for.

    Args:
      promise: says at that time what happens until then, and how long it takes.
    """
    watched, own = _of_command, None
    if watched is None and threading.current_thread() is threading.main_thread():
        watched = own = Watch(leaves=False)
    if watched is None:  # the caller's signals are its own
        yield Stop()
        return
    watched.promise = promise
    try:
        yield watched
    finally:
        watched.promise = None
        if own is not None:
            own.restore()


def _say(text: str) -> None:
    """Writes to standard error in a way that no other thread can hold up."""
    with contextlib.suppress(OSError):
        start = NEW_LINE if os.isatty(2) else ""
        os.write(2, f"{start}{text}\n".encode())
