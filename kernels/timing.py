"""Device time of jitted functions."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

MAX_CALLS = 200  # of a sample
# Dense bfloat16 operations a second, by the name of a GPU (NVIDIA's data sheets).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of `samples`.

    A sample is an average over calls that were enqueued back to back.
    """

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    def tflops(self, flops: float) -> float:
        """Tera floating point operations a second, for a call of `flops`."""
        return flops / self.seconds / 1e12


def mfu(rate: float, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: operations a second over the devices' peak; None: unknown."""
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
    return None if peak is None else rate / devices / peak


def device_time[*Args, R](
    function: Callable[[*Args], R],
    *args: *Args,
    repetitions: int = 7,
    sample_seconds: float = 0.02,
) -> Timing:
    """Times `function(*args)`, already jitted, inputs on the device.

    A sample enqueues calls back to back and waits once, so that dispatch overlaps with the device's
    work. For a call shorter than its dispatch (tens of microseconds) the result is the dispatch:
    time `chained` calls.

    Args:
      function: returns arrays; compiled by a first call that is not timed.
      repetitions: samples.
      sample_seconds: lower bound on a sample's length, where `MAX_CALLS` calls reach it.
    """
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = max(time.perf_counter() - start, 1e-9)
    calls = max(1, min(MAX_CALLS, round(sample_seconds / once)))
    samples = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return Timing(tuple(samples))


def chained[*Args, R](
    function: Callable[[*Args], R], times: int
) -> Callable[[*Args], tuple[R, ...]]:
    """A function that calls `function` `times` times in one program; for timing alone.

    The calls come one after another, with one dispatch, and all results are returned. They stand
    side by side, not in a loop: XLA launches each pass of a loop by itself, which takes as long as
    a brief kernel. The compiler can neither merge the calls nor leave one out: the arguments of
    each pass a barrier together with the results of the one before, which costs nothing on a
    device, and what has passed is what is returned.
    """
    call = jax.jit(function)  # traced and lowered once

    def run(*args: *Args) -> tuple[R, ...]:
        results, passed = call(*args), []
        for _ in range(times - 1):
            args, results = lax.optimization_barrier((args, results))
            passed.append(results)
            results = call(*args)
        return *passed, results

    return run
