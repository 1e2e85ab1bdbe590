"""A benchmark in several processes of this host, each with one device.

The benchmark has the flags `--processes` and `--device` (cpu or gpu).
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import jax
from absl import flags

from ultra_hstu.parallel import processes

FLAGS = flags.FLAGS
_PLACE = "BENCH_PROCESS"  # of a process that was started here: its number, of how many, and a port


def in_processes(measure: Callable[[], None]) -> None:
    """Runs `measure` in `--processes` of this command, connected to one another."""
    if place := os.environ.get(_PLACE):
        number, count, port = map(int, place.split())
        processes.join(f"localhost:{port}", count, number, detect=False, seconds=300)
    elif FLAGS.processes > 1:
        _start(FLAGS.processes)
        return
    measure()
    processes.end()


def _start(count: int) -> None:
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    module = sys.modules["__main__"].__spec__
    assert module is not None  # a command is started by `python -m`
    command = [sys.executable, "-m", module.name, *sys.argv[1:]]
    started = []
    for number in range(count):
        own = {_PLACE: f"{number} {count} {port}"}
        if FLAGS.device == "gpu":
            own |= {"CUDA_VISIBLE_DEVICES": str(number)}
        else:
            own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        started.append(subprocess.Popen(command, env=os.environ | own))
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"the processes ended with exit codes {codes}, see above")


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"
