"""A deployment of `experiments.serve` in its own process, and closed loops of requests to it."""

import asyncio
import contextlib
import dataclasses
import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import aiohttp
import numpy as np
import psutil
from rich.progress import track

from scripts.load.requests import Sent
from ultra_hstu import report

LIMIT_S = 60  # a request that takes longer hangs
STOP_S = 120


@dataclasses.dataclass(frozen=True)
class Served:
    """A deployment that runs."""

    process: subprocess.Popen
    url: str
    seconds: float  # from the start of the command to its first answer

    def replicas(self) -> list[psutil.Process]:
        """The processes of this deployment's replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                    found.append(process)
        return found

    def rss_mib(self) -> float:
        return sum(process.memory_info().rss for process in self.replicas()) / 2**20


@contextlib.contextmanager
def deployment(
    workdir: str, *arguments: str, port: int, errors: IO[str] | int = subprocess.DEVNULL
) -> Iterator[Served]:
    """`experiments.serve` with these arguments, ended by an interrupt; `errors` takes what it says
    on standard error.

    Raises ValueError where it does not come up.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "experiments.serve", f"--workdir={workdir}"]
    command += [f"--port={port}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            assert process.stdout is not None
            if not any("its description at /docs" in line for line in process.stdout):
                ended = f"{' '.join(command[1:])} ended with {process.wait()}"
                raise ValueError(f"{ended}: start it by hand to see why")
            yield Served(process, f"http://127.0.0.1:{port}", time.monotonic() - started)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=STOP_S)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What became of a request; status 0: the connection broke, -1: no answer in time."""

    sent: Sent
    status: int
    body: bytes
    began: float
    ended: float
    version: str = ""  # of the model that answered, as the answer names it


async def closed_loop(
    url: str,
    requests: Iterable[Sent],
    connections: int,
    seen: list[Seen] | None = None,
    what: str = "",
) -> list[Seen]:
    """Every request once, over so many connections; `seen` fills as answers come."""
    seen = [] if seen is None else seen
    turns = iter(track(requests, what, console=report.make_console(), transient=True))

    async def connection(session: aiohttp.ClientSession) -> None:
        for sent in turns:
            began, version = time.perf_counter(), ""
            try:
                body, headers = io.BytesIO(sent.body), {"content-type": sent.kind}
                async with session.request(
                    sent.method, sent.path, data=body, headers=headers
                ) as response:
                    status, answer = response.status, await response.read()
                    version = response.headers.get("x-model-version", "")
            except TimeoutError:
                status, answer = -1, b""
            except aiohttp.ClientError:
                status, answer = 0, b""
            seen.append(Seen(sent, status, answer, began, time.perf_counter(), version))

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(LIMIT_S)) as session:
        await asyncio.gather(*(connection(session) for _ in range(connections)))
    return seen


def speed(seen: Sequence[Seen]) -> dict[str, float]:
    ms = np.array([1e3 * (one.ended - one.began) for one in seen])
    seconds = max(one.ended for one in seen) - min(one.began for one in seen)
    return {
        "per_second": len(seen) / seconds,
        **{f"p{q}_ms": float(np.percentile(ms, q)) for q in (50, 95, 99)},
        "max_ms": float(ms.max()),
    }
