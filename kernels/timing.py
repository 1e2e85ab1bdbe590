"""Device time of jitted functions, and what it means: TFLOP/s, bandwidth, share of a peak."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of `samples`, each an average over calls that were enqueued back to back."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    def tflops(self, flops: float) -> float:
        """Tera floating point operations a second, for a call of `flops`."""
        return flops / self.seconds / 1e12

    def gigabytes(self, num_bytes: float) -> float:
        """Gigabytes (1e9) a second, for a call that moves `num_bytes`."""
        return num_bytes / self.seconds / 1e9

    def utilization(self, flops: float, peak_tflops: float) -> float:
        """Share of a peak, which may be a data sheet's or a matrix product's in the same run."""
        return self.tflops(flops) / peak_tflops


def device_time(
    function: Callable[..., Any],
    *args: Any,
    repetitions: int = 7,
    sample_seconds: float = 0.02,
    max_calls: int = 200,
) -> Timing:
    """Times `function(*args)`, already jitted, inputs on the device.

    A sample enqueues calls back to back, enough to last `sample_seconds`, and waits once, so that dispatch overlaps
    with the device's work; for a call shorter than its dispatch (tens of microseconds) the result is the dispatch: time
    `chained` calls.

    Args:
      function: returns arrays; compiled by a first call that is not timed.
      repetitions: samples.
      sample_seconds: lower bound on a sample's length.
      max_calls: upper bound on its calls.
    """
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = max(time.perf_counter() - start, 1e-9)
    calls = max(1, min(max_calls, round(sample_seconds / once)))
    samples = []
    for _ in range(repetitions):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return Timing(tuple(samples))


def chained(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A function that calls `function` `times` times, one after another, in one program, so with one dispatch; for timing alone. Returns the last results.

    So that the compiler neither merges the calls nor moves them out of the loop, the arguments of each pass a barrier together with the results of
    the one before, which costs nothing on a device.
    """

    def run(*args: Any) -> Any:
        def again(_: Any, carry: Any) -> Any:
            args, _ = lax.optimization_barrier(carry)
            return args, function(*args)

        results = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
        )
        return lax.fori_loop(0, times, again, (args, results))[1]

    return run
