"""Work that happens behind the caller, in the order of its calls, and may be superseded."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

REST = 9  # times as long as a job took


class _Job(NamedTuple):
    run: Callable[[], None]
    lasting: bool


class Behind:
    """A thread that does one job after another, and rests in between.

    The interpreter runs one thread at a time, so jobs that follow each other closely would slow the
    caller down: at most a tenth of the time is spent on them, until `join` waits for them.

    Args:
      most: jobs that may wait for it, at least 2. Of more, the oldest is left out; of lasting ones,
        the newest stays.
    """

    def __init__(self, most: int) -> None:
        self.most = max(most, 2)
        self._thread = ThreadPoolExecutor(1)
        self._changed = threading.Condition()  # of what is below
        self._hurried = False
        self._rested_at = 0.0
        self._waiting: list[_Job] = []
        self._working = False
        self._work: Future[None] | None = None

    def put(self, run: Callable[[], None], *, lasting: bool) -> None:
        """Begins a job, or lets it wait. An error of one before is raised here, once."""
        with self._changed:
            self._waiting.append(_Job(run, lasting))
            if len(self._waiting) > self.most:
                newest = next((job for job in reversed(self._waiting) if job.lasting), None)
                self._waiting.remove(next(job for job in self._waiting if job is not newest))
            ended, idle = self._work, not self._working
            if idle:
                self._working, self._work = True, self._thread.submit(self._do)
        if idle and ended is not None:
            ended.result()

    def join(self) -> None:
        """Returns when all jobs are done. An error of one is raised here, once."""
        work, self._work = self._work, None
        if work is None:
            return
        with self._changed:
            self._hurried = True
            self._changed.notify()
        try:
            work.result()
        finally:
            self._hurried = False

    def _do(self) -> None:
        while True:
            with self._changed:
                self._working = bool(self._waiting)
                if not self._working:
                    return
                rest = max(self._rested_at - time.monotonic(), 0)
                self._changed.wait_for(lambda: self._hurried, rest)
                job = self._waiting.pop(0)
            began = time.monotonic()
            try:
                job.run()
            except BaseException:
                with self._changed:
                    self._working = False
                raise
            ended = time.monotonic()
            self._rested_at = ended + REST * (ended - began)
