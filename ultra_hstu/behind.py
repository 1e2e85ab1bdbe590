"""Work that happens behind the caller, in the order of its calls, and may be superseded."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple


class _Job(NamedTuple):
    run: Callable[[], None]
    lasting: bool


class Behind:
    """A thread that does one job after another.

    Args:
      most: jobs that may wait for it, at least 2. Of more, the oldest is left out; of lasting ones,
        the newest stays.
    """

    def __init__(self, most: int) -> None:
        self.most = max(most, 2)
        self._thread = ThreadPoolExecutor(1)
        self._lock = threading.Lock()  # of the two below
        self._waiting: list[_Job] = []
        self._working = False
        self._work: Future[None] | None = None

    def put(self, run: Callable[[], None], *, lasting: bool) -> None:
        """Begins a job, or lets it wait. An error of one before is raised here, once."""
        with self._lock:
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
        if work is not None:
            work.result()

    def _do(self) -> None:
        while True:
            with self._lock:
                self._working = bool(self._waiting)
                if not self._working:
                    return
                job = self._waiting.pop(0)
            try:
                job.run()
            except BaseException:
                with self._lock:
                    self._working = False
                raise
