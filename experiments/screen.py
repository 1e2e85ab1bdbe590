"""The first line of a command, before its imports, which take seconds."""

import contextlib
import functools
import os
import platform
import sys
import threading
import time
from types import TracebackType

from ultra_hstu import signals

# Nothing is said of work where the output is the answer itself, or another process says it.
SILENT = ("--quiet", "--help", "--helpshort", "--helpfull", "-h", "-?", "--show")
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# Their standard output is what they are asked for: what they say of their work is apart from it.
RESULTS = ("evaluate", "recommend", "export", "inspect", "compare")

STILL_S = 6.0  # after so long it says again that it is loading

_begun = False
loaded = threading.Event()  # set when the imports are over


def begin(name: str) -> None:
    """Says that the command works, and where; from here on signals end it in order."""
    global _begun
    if _begun:
        return
    _begun = True
    sys.excepthook = functools.partial(_without_trace, signals.watch())
    if is_silent(sys.argv[1:]):
        return
    gpus = sum(entry[:6] == "nvidia" and entry[6:].isdecimal() for entry in os.listdir("/dev"))
    where = f"{platform.node()}, {len(os.sched_getaffinity(0))} cores, {gpus} GPUs"
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"{name:<9} {when}, process {os.getpid()} on {where}; loading the code\n"
    stream = sys.stderr if name in RESULTS else sys.stdout

    def say(text: str) -> None:
        if stream is not None:
            with contextlib.suppress(OSError):  # the command's own first words report it
                stream.write(text)
                stream.flush()

    def repeat() -> None:
        began = time.monotonic()
        while not loaded.wait(STILL_S):
            say(f"{name:<9} loading the code, {time.monotonic() - began:.0f} s so far\n")

    say(text)
    threading.Thread(target=repeat, daemon=True).start()


def is_silent(arguments: list[str]) -> bool:
    """Whether a command with these arguments says nothing of its work."""
    others = [one for one in arguments if one.startswith("--process=") and one != "--process=0"]
    if "--distributed" in arguments:
        others += [name for name in RANKS if os.environ.get(name, "0") != "0"]
    return bool(others) or any(argument in SILENT for argument in arguments)


def _without_trace(
    watch: signals.Watch,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Stands in for `sys.excepthook`: an interrupted import needs no stack."""
    if issubclass(kind, KeyboardInterrupt) and watch.requested:
        watch.acknowledged.wait(1)
        os._exit(128 + watch.requested)
    sys.__excepthook__(kind, error, trace)
