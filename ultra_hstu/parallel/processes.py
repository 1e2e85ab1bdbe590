"""Several processes of one run find each other, exchange values on the host, and end together.

Everything goes through JAX's coordination service, which lives in process 0. All processes must
call the functions below in the same order, as they must start the same compiled programs. In a run
of one process the functions cost nothing.
"""

import atexit
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
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

# The key-value store of the coordination service has no public name.
from jax._src import distributed
from jax._src.lib import _jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from ultra_hstu.fields import difference
from ultra_hstu.parallel.mesh import CONTEXT, DATA, EVERYWHERE, put

# JAX ends all processes when one sends no heartbeat for so long, in the middle of a collective too.
HEARTBEAT_SECONDS = 30
POLL_SECONDS = 0.5  # a process checks this often whether another has failed
FAREWELL_SECONDS = 5  # the longest wait at the end, for the others' errors or for a thread
LOST = 4  # exit code of a process that ends since another failed or was lost
# Preparing data may take hours. The heartbeats notice a process that dies meanwhile.
_DAY_MS = 24 * 3600 * 1000
_FAILED, _ENDED = "ultra_hstu/failed/", "ultra_hstu/ended/"
_calls = itertools.count()
_ending = threading.Event()  # set before the connection is closed at the end of a good run
_ended = threading.Event()  # set when the interpreter ends


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    detect: bool,
    seconds: int,
) -> None:
    """Connects this process to the others of its run. Without arguments the run has one process.

    Call it before anything that uses a device.

    Args:
      coordinator: HOST:PORT where process 0 listens. All processes give the same one.
      processes: the number of processes.
      process: the index of this process, from 0.
      detect: JAX asks SLURM, Kubernetes (GKE) or Open MPI for these three instead.
      seconds: the longest wait for the others; then the process ends with exit code 1.

    Raises:
      ValueError: the arguments do not fit together, no cluster was detected, or the coordinator's
        address cannot be used.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if detect:
        if len(missing) < len(given):
            raise ValueError(
                "--distributed asks the cluster for what --coordinator, --processes and --process "
                "say: give the one or the others"
            )
    elif len(missing) == len(given):
        return
    elif missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: "
            "--coordinator=HOST:PORT --processes=N --process=I, with I from 0 to N - 1"
        )
    if seconds < 1:
        raise ValueError(f"--connect_seconds={seconds} must be at least 1")
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as node1:7000")
        if not 0 <= process < processes:
            raise ValueError(
                f"--process={process} must be from 0 to {processes - 1}, "
                f"below --processes={processes}"
            )
        if process == 0:
            _require_free(int(port))
    _connect(coordinator, processes, process, detect, seconds)
    _start_watching()


def _require_free(port: int) -> None:
    """Raises ValueError if another program listens on the port.

    JAX would share the port with it, and the processes of two runs would connect to each other.
    """
    try:
        with socket.create_server(("", port)):
            return
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): "
            "choose another for --coordinator"
        ) from None


def _connect(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool, seconds: int
) -> None:
    """Connects within `seconds`: JAX's own limit, which is later, aborts without an address."""

    def give_up() -> None:
        state = distributed.global_state
        where = coordinator or state.coordinator_address or "the address that the cluster names"
        me = f"process {state.process_id}{'' if processes is None else f' of {processes}'}"
        _exit(
            f"the processes did not all meet at {where} within {seconds} s (this is {me}). "
            "Is process 0 running there and the port open to the others, and have all been "
            "started? --connect_seconds=N waits longer.",
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
                f"--distributed found no cluster ({error}): neither SLURM's variables (start with "
                "srun inside a job), nor Kubernetes (needs the package `kubernetes`), nor Open "
                "MPI's. Without one, give --coordinator=HOST:PORT --processes=N --process=I."
            ) from None
        raise ValueError(
            "the processes could not meet at "
            f"{coordinator or 'the address that the cluster names'}: {error}"
        ) from error
    finally:
        timer.cancel()
    jax.devices()  # all processes make their backends together


def several() -> bool:
    """Whether this process is one of several."""
    state = distributed.global_state
    return state.client is not None and state.num_processes > 1


def is_first() -> bool:
    """Whether this is process 0, which writes the files that one process writes."""
    return not several() or distributed.global_state.process_id == 0


def broadcast[T](make: Callable[[], T]) -> T:
    """Calls `make` in process 0 alone and returns its JSON value in every process.

    A ValueError or OSError of `make` is raised in every process, too.
    """
    if not several():
        return make()
    key = f"ultra_hstu/{next(_calls)}"
    if is_first():
        try:
            value = make()
        except (ValueError, OSError) as error:
            answer = {"error": str(error), "disk": isinstance(error, OSError)}
            _store().key_value_set(key, json.dumps(answer))
            raise
        _store().key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(_store().blocking_key_value_get(key, _DAY_MS))
    if "error" in answer:
        raise (OSError if answer["disk"] else ValueError)(answer["error"])
    return answer["value"]


def all_gather[T](value: T, seconds: int | None = None) -> list[T]:
    """Returns the JSON values of all processes, in the order of their indices.

    Raises:
      TimeoutError: after `seconds`, with the index of a process that gave no value.
    """
    if not several():
        return [value]
    state, call = distributed.global_state, next(_calls)
    timeout_ms = _DAY_MS if seconds is None else seconds * 1000
    _store().key_value_set(f"ultra_hstu/{call}/{state.process_id}", json.dumps(value))
    values = []
    for index in range(state.num_processes):
        try:
            found = _store().blocking_key_value_get(f"ultra_hstu/{call}/{index}", timeout_ms)
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {index} did not answer within {seconds} s") from error
        values.append(json.loads(found))
    return values


def barrier() -> None:
    """Waits until all processes are here.

    Call it before a new program runs. Some collectives give up after 30 seconds, so a process that
    compiles for longer than the others must not keep them waiting inside the program.
    """
    all_gather(None)


def require_same[T](what: str, value: dict[str, T]) -> None:
    """Raises ValueError in every process, with the difference, if one has another value."""
    values = all_gather(value)
    for index, other in enumerate(values):
        if changed := difference(values[0], other):
            listed = "\n  ".join(changed)
            raise ValueError(
                f"process {index} has another {what} than process 0 "
                f"(process 0 -> process {index}):\n  {listed}"
            )


def all_reduce_max(number: int, mesh: Mesh | None) -> Callable[[], int]:
    """Starts a reduction of the processes' numbers on the devices of the mesh.

    Returns a function that waits for the largest number. The devices run the reduction between two
    other programs, and do not wait for the host to read it.
    """
    if not several() or mesh is None:
        return lambda: number
    number_D = put(np.full(mesh.size, number, np.int32), mesh, PartitionSpec((DATA, CONTEXT)))
    maximum = _maximum(mesh)(number_D)
    return lambda: int(maximum)


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[Int32[Array, " D"]], Int32[Array, ""]]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, EVERYWHERE))


def end() -> None:
    """Waits for the other processes at the end of a good run, and closes the connection."""
    if several():
        _ending.set()
        jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process, and all others with its message.

    It waits neither for the devices nor for the checkpoints' threads: their work needs the others.
    """
    if not several():
        sys.exit(code)
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
        _store().key_value_set(f"{_FAILED}{state.process_id}", message)
    _leave(None, code)


def _start_watching() -> None:
    watcher = threading.Thread(target=_watch, daemon=True)

    def stop() -> None:
        _ended.set()
        watcher.join(FAREWELL_SECONDS)

    # A thread that returns from native code after Python's end is ended by Python in a way that
    # aborts the whole process (signal 6), after work that was good.
    atexit.register(stop)
    watcher.start()


def _watch() -> None:
    """Ends this process when another has failed, or when process 0 is gone too early."""
    state = distributed.global_state
    while not _ended.wait(POLL_SECONDS):
        client = state.client
        if client is None:
            return
        try:
            failed = client.key_value_dir_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            # In a good run process 0 leaves once all processes have called `end`, which may return
            # later in this one.
            if _ending.is_set():
                return
            _leave(
                f"process 0 at {state.coordinator_address} is gone, which the others cannot do "
                "without. Start the same command again in all processes: it goes on from the last "
                "checkpoint.",
                LOST,
            )
        others = [
            (key.rpartition("/")[2], text)
            for key, text in failed
            if key != f"{_FAILED}{state.process_id}"
        ]
        if others:
            time.sleep(2 * POLL_SECONDS)  # each process prints an error that all of them have
            _leave(f"process {others[0][0]} has stopped: {others[0][1]}", LOST)


def _leave(message: str | None, code: int) -> NoReturn:
    """Ends the process at once, whatever its threads wait for."""
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if state.service is None:
            _store().key_value_set(f"{_ENDED}{state.process_id}", "")
        # The service ends with process 0, and without it the others would not learn the reason.
        deadline = time.monotonic() + FAREWELL_SECONDS
        while state.service is not None and time.monotonic() < deadline:
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


def _store() -> _jax.DistributedRuntimeClient:
    client = distributed.global_state.client
    assert client is not None
    return client
