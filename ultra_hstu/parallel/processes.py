"""Several processes of one run: they find each other, agree on what one of them knows, and end together.

All of it goes through JAX's coordination service, which lives in process 0. Every process must call the functions below in the same order, as it must
start the same compiled programs. In a run of one process they cost nothing.
"""

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import (
    distributed,
)  # the key-value store of the coordination service has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ultra_hstu.fields import difference
from ultra_hstu.parallel.mesh import CONTEXT, DATA

HEARTBEAT_SECONDS = 30  # JAX ends all processes when one has been silent for so long, in the middle of a collective too
POLL_SECONDS = 0.5  # how often a process looks whether another has failed
FAREWELL_SECONDS = 5  # process 0 stays so long for the others' last words
LOST = 4  # exit code where another process failed or was lost
_DAY = (
    24 * 3600 * 1000
)  # others may prepare data for hours; one that dies is noticed by its heartbeats
_FAILED, _ENDED = "ultra_hstu/failed/", "ultra_hstu/ended/"
_calls = itertools.count()


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    detect: bool,
    seconds: int,
) -> None:
    """Makes this process one of a run's; before anything that uses a device. Without arguments the run has this one process.

    Args:
      coordinator: HOST:PORT where process 0 listens, the same in all processes; with `processes`, how many there are, and `process`, which this is.
      detect: JAX asks SLURM, Kubernetes (GKE) or Open MPI instead.
      seconds: how long to wait for the others; then the process ends with exit code 1.

    Raises:
      ValueError: arguments that do not fit together, no cluster where one was to be detected, a coordinator's address that cannot be used.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if detect and len(missing) < len(given):
        raise ValueError(
            "--distributed asks the cluster for what --coordinator, --processes and --process say: give the one or the others"
        )
    if not detect and len(missing) == len(given):
        return
    if not detect and missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: --coordinator=HOST:PORT --processes=N --process=I, with I from 0 to N - 1"
        )
    if seconds < 1:
        raise ValueError(f"--connect_seconds={seconds} must be at least 1")
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as node1:7000")
        if not 0 <= process < processes:
            raise ValueError(
                f"--process={process} must be from 0 to {processes - 1}, below --processes={processes}"
            )
        if process == 0:
            _require_free(int(port))
    _connect(coordinator, processes, process, detect, seconds)
    threading.Thread(target=_watch, daemon=True).start()


def _require_free(port: int) -> None:
    """JAX would share a port that another program listens on, and the processes of two runs would meet."""
    try:
        with socket.create_server(("", port)):
            return
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): choose another for --coordinator"
        ) from None


def _connect(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool, seconds: int
) -> None:
    """JAX's own limit aborts without a word about the address; so ours comes first."""

    def give_up() -> None:
        state = distributed.global_state
        where = coordinator or state.coordinator_address or "the address that the cluster names"
        me = f"process {state.process_id}{'' if processes is None else f' of {processes}'}"
        _exit(
            f"the processes did not all meet at {where} within {seconds} s (this is {me}). Is process 0 running there and the port open to the "
            "others, and have all been started? --connect_seconds=N waits longer.",
            1,
        )

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    # SIGTERM is the run's own business: it saves its state.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        if detect and isinstance(error, ValueError):
            raise ValueError(
                f"--distributed found no cluster ({error}): neither SLURM's variables (start with srun inside a job), nor Kubernetes (needs the package "
                "`kubernetes`), nor Open MPI's. Without one, give --coordinator=HOST:PORT --processes=N --process=I."
            ) from None
        raise ValueError(
            f"the processes could not meet at {coordinator or 'the address that the cluster names'}: {error}"
        ) from error
    finally:
        timer.cancel()
    jax.devices()  # here, since all processes do it together


def several() -> bool:
    """Whether this process is one of several."""
    return (
        distributed.global_state.client is not None and distributed.global_state.num_processes > 1
    )


def is_first() -> bool:
    """Whether this is the process that writes what one process writes."""
    return not several() or distributed.global_state.process_id == 0


def of_first[T](make: Callable[[], T]) -> T:
    """What process 0 makes, a JSON value, for all of them; its ValueError or OSError, too."""
    if not several():
        return make()
    key = f"ultra_hstu/{next(_calls)}"
    if is_first():
        try:
            value = make()
        except (ValueError, OSError) as error:
            _store().key_value_set(
                key, json.dumps({"error": str(error), "disk": isinstance(error, OSError)})
            )
            raise
        _store().key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(_store().blocking_key_value_get(key, _DAY))
    if "error" in answer:
        raise (OSError if answer["disk"] else ValueError)(answer["error"])
    return answer["value"]


def of_all(value: Any, seconds: int | None = None) -> list[Any]:
    """The JSON values of all processes.

    Raises:
      TimeoutError: after `seconds`, with the process that said nothing.
    """
    if not several():
        return [value]
    state, call = distributed.global_state, next(_calls)
    _store().key_value_set(f"ultra_hstu/{call}/{state.process_id}", json.dumps(value))
    values = []
    for number in range(state.num_processes):
        try:
            found = _store().blocking_key_value_get(
                f"ultra_hstu/{call}/{number}", _DAY if seconds is None else seconds * 1000
            )
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {number} did not answer within {seconds} s") from error
        values.append(json.loads(found))
    return values


def meet() -> None:
    """Waits until all processes are here. Before a new program runs: one that compiles for longer than the others must not keep them waiting in it,
    where some collectives give up after 30 seconds."""
    of_all(None)


def require_same(what: str, value: dict[str, Any]) -> None:
    """Raises ValueError, in every process, if a process has another value than process 0, with the difference."""
    values = of_all(value)
    for number, other in enumerate(values):
        if changed := difference(values[0], other):
            listed = "\n  ".join(changed)
            raise ValueError(
                f"process {number} has another {what} than process 0 (process 0 -> process {number}):\n  {listed}"
            )


def largest(number: int, mesh: Mesh | None) -> Callable[[], int]:
    """The largest of the processes' numbers, asked for between two programs of the devices; the answer is read later, without keeping the devices
    waiting."""
    if not several() or mesh is None:
        return lambda: number
    devices = NamedSharding(mesh, PartitionSpec((DATA, CONTEXT)))
    number_D = jax.make_array_from_callback(
        (mesh.size,), devices, lambda _: np.full(1, number, np.int32)
    )
    most = _maximum(mesh)(number_D)
    return lambda: int(most)


@functools.cache
def _maximum(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def end() -> None:
    """Waits for the other processes at the end of a run that went well."""
    if several():
        jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process and, with its message, all others. Nothing is waited for: what the devices and the checkpoints' threads do needs the others."""
    if not several():
        sys.exit(code)
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
        _store().key_value_set(f"{_FAILED}{state.process_id}", message)
    _leave(None, code)


def _watch() -> None:
    """Ends this process when another has failed."""
    state, pause = distributed.global_state, threading.Event()
    while not pause.wait(POLL_SECONDS):
        client = state.client
        if client is None:
            return
        try:
            failed = client.key_value_dir_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            if state.client is None:
                return  # the end of the run
            _leave(
                f"process 0 at {state.coordinator_address} is gone, which the others cannot do without. Start the same command again in all "
                "processes: it goes on from the last checkpoint.",
                LOST,
            )
        others = [
            (key.rpartition("/")[2], text)
            for key, text in failed
            if key != f"{_FAILED}{state.process_id}"
        ]
        if others:
            pause.wait(2 * POLL_SECONDS)  # an error that all have is told by each of them
            _leave(f"process {others[0][0]} has stopped: {others[0][1]}", LOST)


def _leave(message: str | None, code: int) -> NoReturn:
    """The end of the process at once, whatever its threads wait for."""
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if state.service is None:
            _store().key_value_set(f"{_ENDED}{state.process_id}", "")
        deadline = time.monotonic() + FAREWELL_SECONDS
        while (
            state.service is not None and time.monotonic() < deadline
        ):  # with this process the service ends, and what the others would say
            if len(_store().key_value_dir_get(_ENDED)) == state.num_processes - 1:
                break
            time.sleep(0.1)
    _exit(message, code)


def _exit(message: str | None, code: int) -> NoReturn:
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store() -> Any:
    return distributed.global_state.client
