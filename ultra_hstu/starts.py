"""`run.json`: every start of the run in a folder, and how it ended."""

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator
from typing import Any

from ultra_hstu import provenance
from ultra_hstu.json_files import read_object, write_json
from ultra_hstu.parallel import processes
from ultra_hstu.workdir import Workdir

log = logging.getLogger(__name__)
STARTED = "still at work, or killed"


@contextlib.contextmanager
def recorded(folder: Workdir) -> Iterator[dict[str, Any]]:
    """Writes a start down, then its end; releases the claimed folder.

    The block gets the entry, and may add to it.

    An entry of "runs" has what `provenance` says (command, commit, versions, device, ...), the
    dates "started" and "ended" (UTC), the wall clock between them in "seconds", and the "outcome":
    "done", or the error that ended it.

    Raises:
      ValueError, OSError: a `run.json` that is damaged or cannot be written, at the start.
    """
    began = time.monotonic()
    try:
        runs = read_starts(folder)
        entry: dict[str, Any] = provenance.provenance() | {"outcome": STARTED}
        entry["started"] = entry.pop("date")
        runs.append(entry)
        _write(folder, runs)
        try:
            yield entry
            entry["outcome"] = "done"
        except BaseException as error:
            entry["outcome"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            entry |= {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
            try:
                _write(folder, runs)
            except OSError as problem:  # must not hide what ended the run
                log.warning("%s", problem)
    finally:
        folder.release()


def _write(folder: Workdir, runs: list[dict[str, Any]]) -> None:
    if processes.is_first():
        write_json(folder.starts, {"runs": runs})


def read_starts(folder: Workdir) -> list[dict[str, Any]]:
    """The entries of `run.json`, none where there is no such file. Raises ValueError naming it."""
    if not folder.starts.exists():
        return []
    return list(read_object(folder.starts, {"runs": list}, "delete it")["runs"])
