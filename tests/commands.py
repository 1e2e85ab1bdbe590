"""Command lines of the repository, run as programs of their own without the start of Python.

Importing JAX and this repository takes most of a small command's time. So one process imports them
once, before it makes a backend, and forks for every command: the child runs the module as
`python -m MODULE ARGUMENTS` does, with its own flags, output, exit code and exit handlers. The only
threads at that time are those of OpenBLAS and jemalloc, which are prepared for a fork.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(
    module: str, *arguments: object, seconds: int = 300, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns for `python -m module *arguments` in a folder."""
    with tempfile.TemporaryDirectory() as files:
        request = {
            "command": [module, *map(str, arguments)],
            "stdout": f"{files}/stdout",
            "stderr": f"{files}/stderr",
            "seconds": seconds,
            "folder": str(folder),
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = [Path(request[name]).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(request["command"], code, *said)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-m", "tests.commands"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _next_command() -> dict[str, object] | None:
    """In the server: None at the end of its input. In a child: the request that the child runs."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(request: dict[str, object]) -> None:
    signal.alarm(request["seconds"])
    os.chdir(request["folder"])
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = request["command"]
    runpy.run_module(request["command"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # What the commands share. The commands themselves define flags, so each is imported by a child.
    import matplotlib.pyplot  # noqa: F401

    import experiments.command  # noqa: F401
    import ultra_hstu.ranking.evaluate  # noqa: F401
    import ultra_hstu.serving  # noqa: F401
    import ultra_hstu.train  # noqa: F401

    if (command := _next_command()) is not None:
        _become(command)
