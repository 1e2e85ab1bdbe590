"""HAProxy as Ray Serve starts it, with limits that Ray's configuration of it lacks.

Ray runs a file that `write_launcher` wrote in place of HAProxy, and with it this module:

    python -I experiments/haproxy.py HAPROXY CONNECTIONS -f CONFIGURATION ...

It changes the configuration that Ray has written, and becomes HAProxy. Standard library only, since
this happens at every reload.
"""

import ctypes
import os
import re
import resource
import shlex
import signal
import sys
from pathlib import Path

HEADERS_S = 5  # in which the whole head of a request must be there; a client may be silent as long
MOST_CONNECTIONS = 16_384
NOBODY = '{"detail": "no replica can answer: the service is starting, or replaces one"}'
_ANSWER = f"status 503 content-type application/json string '{NOBODY}'"
_PR_SET_PDEATHSIG = 1
_FILES = {
    "BINARY_PATH": "haproxy",
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_FILE": "server-state",
    "SERVER_STATE_BASE": "",
}

# Pattern, and what stands there instead.
CHANGES = {
    # Whoever may write to this socket may stop the service.
    r"(stats socket \S+) mode 666": r"\1 mode 600",
    r"(defaults\n    mode http\n)": rf"\1    timeout http-request {HEADERS_S}s\n",
    r"errorfile 503 \S+": f"http-error {_ANSWER}",
    # The application has all paths. A path of none: the application has not come yet.
    r"(backend default_backend\n    http-request return ).*": rf"\1{_ANSWER}",
}
_FRONTEND = r"(frontend http_frontend\n    bind \S+)\n"
# On loopback there may be a proxy, with the connections of many.
_LIMIT = r"""\1
    stick-table type ipv6 size 100k expire 1m store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc0_conn_cur gt {connections} }} !{{ src 127.0.0.0/8 ::1 }}
"""
# Ray's proxy in Python: in place of replicas that are not there it lets requests wait, and counts
# as healthy.
_STAND_IN = r"    server \S+ \S+ check backup\n"


def environment(folder: str) -> dict[str, str]:
    """Variables of Ray Serve: HAProxy's files are in this folder, and it has limits."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = files == resource.RLIM_INFINITY
    # Two files a connection, and pipes for a quarter of them.
    most = MOST_CONNECTIONS if unlimited else min(MOST_CONNECTIONS, (files - 200) * 2 // 5)
    values = {name: os.path.join(folder, file) for name, file in _FILES.items()}
    values |= {"MAXCONN": str(most), "TIMEOUT_CLIENT_S": str(HEADERS_S)}
    return {f"RAY_SERVE_HAPROXY_{name}": value for name, value in values.items()}


def write_launcher(folder: str, haproxy: str, connections: int) -> None:
    """Writes the file that Ray runs.

    Args:
      haproxy: HAProxy itself.
      connections: of one address, loopback aside.
    """
    path = Path(folder, _FILES["BINARY_PATH"])
    command = shlex.join([sys.executable, "-I", __file__, haproxy, str(connections)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o700)


def limited(configuration: str, connections: int) -> str:
    """Ray's configuration of HAProxy with the limits. Raises ValueError where one has no place."""
    changes = CHANGES | {_FRONTEND: _LIMIT.format(connections=connections)}
    for pattern, text in changes.items():
        configuration, count = re.subn(pattern, text, configuration)
        if not count:
            raise ValueError(
                f"Ray's configuration of HAProxy has nothing like {pattern!r}: "
                "install the version of Ray in requirements-serve.txt"
            )
    return re.sub(_STAND_IN, "", configuration)


def main(haproxy: str, connections: str, *arguments: str) -> None:
    parent = os.getppid()
    if sys.platform == "linux":  # HAProxy dies with the process that looks after it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    os.setpgid(0, 0)  # Ctrl-C is for the command, which lets requests end
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(limited(path.read_text(), int(connections)))
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
