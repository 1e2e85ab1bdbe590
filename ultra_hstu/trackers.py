"""Where a run's metrics go beside `metrics.jsonl`: TensorBoard, and whatever fits `Tracker`."""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """What receives the metrics of a run: three methods, called in this order.

    A run that goes on after a kill logs the steps since its last checkpoint again. With several
    processes the first one alone calls these methods.
    """

    def config(self, values: dict[str, Any]) -> None:
        """Once at the start: the configuration, sections as dicts, as `config.json` holds it."""

    def log(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """After every epoch: numbers by name, such as epoch, loss, seconds, hr@10."""

    def close(self) -> None:
        """At the end, whatever it was."""


class TensorBoard:
    """A `Tracker` that writes event files: numbers, and the configuration as text.

    Args:
      folder: made if it does not exist.
      resume_step: events after it are dropped.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0):
        folder.mkdir(exist_ok=True)
        # Without the thread of its SummaryWriter, whose errors nobody sees.
        self._events = EventsWriter(str(folder / "events"))
        restart = SessionLog(status=SessionLog.START)  # drops what follows
        self._events.write_event(Event(step=resume_step + 1, session_log=restart))

    def config(self, values: dict[str, Any]) -> None:
        shown = json.dumps(values, indent=2).replace("\n", "\n    ")  # a block of Markdown
        summary = text("config", f"    {shown}")
        self._events.write_event(Event(wall_time=time.time(), step=0, summary=summary))

    def log(self, step: int, metrics: Mapping[str, int | float]) -> None:
        for name, value in metrics.items():
            summary = scalar(name.replace("@", "_"), value)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write that met it
            self._events.close()


class Guarded:
    """Another tracker, whose trouble costs a warning and its further metrics, never the run."""

    def __init__(self, tracker: Tracker):
        self._tracker: Tracker | None = tracker

    def config(self, values: dict[str, Any]) -> None:
        self._call("config", values)

    def log(self, step: int, metrics: Mapping[str, int | float]) -> None:
        self._call("log", step, metrics)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            if self._tracker is not None:
                getattr(self._tracker, method)(*arguments)
        except Exception as error:
            name, self._tracker = type(self._tracker).__name__, None
            problem = f"{type(error).__name__}: {error}"
            log.warning("%s.%s failed (%s): it gets no more of this run", name, method, problem)
