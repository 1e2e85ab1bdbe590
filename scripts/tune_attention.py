"""Measures sizes of the attention kernels on this machine's GPU and writes the fastest to the table that they read.

    python -m scripts.tune_attention --implementations triton,mosaic --workloads causal_d128_4x8192,ml1m

Each kernel of each workload is timed with every candidate; the winner's output and gradients are checked before the table
(`kernels/hstu_attention/tuning.json`) is written. An entry replaces the one of the same key; others stay.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import device
from kernels.hstu_attention import make_plan, tuning
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.hstu_attention.mosaic import backward as mosaic_backward
from kernels.hstu_attention.mosaic import forward as mosaic_forward
from kernels.hstu_attention.mosaic.schedule import WorkList, make_schedules
from kernels.hstu_attention.triton import attention as triton
from kernels.hstu_attention.triton.sizes import LaunchSizes, heuristic, padded
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import chained, device_time
from scripts.bench import attention as bench_attention
from scripts.bench.turns import each, preparing, turn
from ultra_hstu.provenance import provenance

NAMES = "causal_d64_4x8192,causal_d128_4x8192,causal_d256_4x8192,window_d128_2x16384,short_d64_512x100,ml1m,ml1m_large"
CALLS = 10  # in one program: kernels of the short workloads take less time than their dispatch
ALLOWED = {
    2: 2e-2,
    4: 5e-3,
}  # error of the winner by bytes of an element; float32 products are TF32

# block_q, block_k, warps, stages
TRITON = {
    (2, 64): {
        "forward": [
            (128, 64, 4, 3),
            (64, 64, 4, 3),
            (64, 64, 4, 4),
            (128, 64, 4, 4),
            (128, 128, 8, 3),
        ],
        "queries": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3)],
        "keys": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (32, 64, 4, 3)],
    },
    (2, 128): {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4), (64, 128, 4, 2)],
        "queries": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)],
        "keys": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3)],
    },
    (2, 256): {
        "forward": [(128, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 3)],
        "queries": [(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 1), (64, 64, 4, 1)],
        "keys": [(32, 64, 8, 2), (32, 128, 8, 1), (32, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 1)],
    },
    (4, 32): {
        "forward": [(32, 32, 2, 2), (32, 32, 4, 2), (16, 32, 2, 2), (16, 32, 1, 2), (32, 32, 1, 2)],
        "queries": [(32, 32, 2, 2), (32, 32, 4, 2), (16, 32, 2, 2), (16, 32, 1, 2)],
        "keys": [(32, 32, 2, 2), (32, 32, 4, 2), (32, 16, 2, 2), (32, 16, 1, 2)],
    },
    (4, 64): {
        "forward": [(32, 32, 4, 2), (16, 32, 2, 2), (32, 32, 2, 2), (16, 16, 2, 2)],
        "queries": [(32, 32, 4, 2), (16, 32, 2, 2), (32, 16, 4, 2), (16, 16, 2, 2)],
        "keys": [(32, 32, 4, 2), (32, 16, 2, 2), (16, 32, 4, 2), (16, 16, 2, 2)],
    },
}
MOSAIC = {
    64: {
        "forward": [{"block_k": 128, "stages": 4}, {"block_k": 64, "stages": 4}],
        "backward": [{"passes": 1}, {"passes": 2}],
    },
    128: {
        "forward": [
            {"block_k": 128, "stages": 2},
            {"block_k": 64, "stages": 4},
            {"block_k": 64, "stages": 3},
        ],
        "backward": [{"passes": 1}, {"passes": 2}],
    },
    256: {
        "forward": [{"block_k": 64, "stages": 2, "q_slots": 1}],
        "backward": [{"passes": 1}, {"passes": 2}],
    },
}

Made = tuple[
    dict[str, int], Callable[..., Any], Any
]  # a candidate, a function of (plan, q, k, v, g) that runs it, the plan it wants


def inputs(w: Workload) -> tuple[Any, dict[str, jax.Array], Any]:
    """(plan, arrays, bias) of a workload."""
    plan = jax.jit(lambda offsets: make_plan(w.mask, offsets, w.rows))(jnp.asarray(w.offsets()))
    return plan, jax.jit(w.arrays)(), w.relative_bias()


def triton_trials(w: Workload, plan: Any, bias: Any) -> Iterable[tuple[str, list[Made]]]:
    """For each kernel, its candidates."""
    size, width = jnp.dtype(w.dtype).itemsize, padded(max(w.k_width, w.v_width, 32))
    capability = device.current().compute_capability
    assert capability is not None, "the tuner runs on a GPU"
    default = heuristic(capability, w.spec)

    def made(kernel: str, launch: LaunchSizes) -> Made:
        sizes = default._replace(**{kernel: launch})
        call = triton.TritonCall(w.alpha, "tf32", sizes)
        tables_and_rows = functools.partial(triton.tables_and_rows, scale=w.scale, bias=bias)
        kernels: dict[str, Callable[..., Any]] = {
            "forward": triton.forward,
            "queries": triton.query_gradients,
            "keys": triton.key_gradients,
        }

        def run(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
            gradient = () if kernel == "forward" else (g,)
            return kernels[kernel](call, (q, k, v), *tables_and_rows(plan), *gradient)

        return launch._asdict(), run, jax.jit(lambda: triton.prepare_for(plan, w.heads, sizes))()

    for kernel, candidates in TRITON[size, width].items():
        yield kernel, [made(kernel, LaunchSizes(*c)) for c in candidates]


def mosaic_trials(w: Workload, plan: Any, bias: Any) -> Iterable[tuple[str, list[Made]]]:
    width, scale = max(w.k_width, w.v_width), jnp.float32(w.scale)

    def with_lists(*wanted: WorkList) -> Any:
        return jax.jit(lambda: plan.storing(wanted, make_schedules(plan, wanted)))()

    def forward(sizes: Any) -> Made:
        config = dataclasses.replace(mosaic_forward.forward_config(w.spec, plan), **sizes)
        ready = with_lists(WorkList.forward(w.heads, config.block_k))
        return (
            sizes,
            lambda plan, q, k, v, g: mosaic_forward.forward(q, k, v, plan, scale, w.alpha, config),
            ready,
        )

    def backward(sizes: Any) -> Made:
        config = mosaic_backward.backward_config(w.spec, plan, **sizes)
        ready = with_lists(*mosaic_backward.work_lists(w.heads, config))
        return (
            sizes,
            lambda plan, q, k, v, g: mosaic_backward.gradients(
                q, k, v, g, plan, scale, w.alpha, config
            ),
            ready,
        )

    yield "forward", [forward(c) for c in MOSAIC[width]["forward"]]
    yield "backward", [backward(c) for c in MOSAIC[width]["backward"]]


TRIALS = {"triton": triton_trials, "mosaic": mosaic_trials}


def fastest(
    name: str, made: list[Made], arrays: tuple[jax.Array, ...]
) -> tuple[dict[str, int], float]:
    """(sizes, microseconds) of the winner. A candidate that does not compile, or does not fit, is out."""

    def attempt(sizes: dict[str, int], run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (RuntimeError, ValueError) as error:
            print(f"{name} {sizes}: {str(error).splitlines()[0][:120]}", flush=True)
            return None

    with preparing():
        programs = [
            attempt(sizes, lambda: jax.jit(chained(run, CALLS)).lower(plan, *arrays).compile())
            for sizes, run, plan in made
        ]  # noqa: B023
    times = []
    with turn():
        for (sizes, _, plan), program in zip(made, programs, strict=True):
            if program is None:
                continue
            timing = attempt(
                sizes,
                lambda: device_time(program, plan, *arrays, repetitions=5, sample_seconds=0.01),
            )  # noqa: B023
            if timing is not None:
                micros = 1e6 * timing.seconds / CALLS
                print(f"{name} {sizes}: {micros:.1f} us", flush=True)
                times.append((micros, sizes))
    if not times:
        raise RuntimeError(
            f"{name}: no candidate ran; add some to TRITON or MOSAIC in scripts/tune_attention.py"
        )
    micros, sizes = min(times, key=lambda pair: pair[0])
    return sizes, micros


def error_of(w: Workload, implementation: str, plan: Any, arrays: dict[str, jax.Array]) -> float:
    """Of output and gradients, with the sizes that the table now gives."""
    run = jax.jit(bench_attention.passes(w, implementation)["both"])
    return bench_attention.error(
        run(plan, *(arrays[name] for name in "qkvg")), bench_attention.expected(w, arrays)
    )


def tune(w: Workload, implementation: str) -> dict[str, Any]:
    """The entry of a workload, put into the table that the kernels of this process read, and checked."""
    with preparing():
        plan, arrays, bias = inputs(w)
        trials = list(TRIALS[implementation](w, plan, bias))
    tensors = tuple(arrays[name] for name in "qkvg")
    chosen = {
        kernel: fastest(f"{w.name} {implementation} {kernel}", made, tensors)
        for kernel, made in trials
    }
    key = tuning.key(implementation, w.spec, plan)
    entry = key._asdict() | {
        "sizes": {kernel: sizes for kernel, (sizes, _) in chosen.items()},
        "microseconds": {kernel: round(micros, 1) for kernel, (_, micros) in chosen.items()},
        "workload": w.name,
    }
    tuning.use(tuning.parse(json.dumps({"entries": [entry]}), w.name))
    with preparing():
        entry["error"] = error_of(w, implementation, plan, arrays)
    if not entry["error"] <= ALLOWED[key.bytes]:
        raise RuntimeError(
            f"{w.name}: {implementation} has error {entry['error']:.1e} with {entry['sizes']}, allowed {ALLOWED[key.bytes]}"
        )
    return entry | {"made": {name: provenance()[name] for name in ("versions", "commit", "date")}}


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries by key, new ones in place of old ones, sorted."""
    by_key = {tuple(entry[name] for name in tuning.Key._fields): entry for entry in [*old, *new]}
    return [by_key[key] for key in sorted(by_key)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementations", default="triton,mosaic")
    parser.add_argument("--workloads", default=NAMES)
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes that compile side by side; XLA_PYTHON_CLIENT_PREALLOCATE=false with more than 1",
    )
    parser.add_argument("--output", type=pathlib.Path, default=tuning.PATH)
    options = parser.parse_args(arguments)
    old = json.loads(options.output.read_text())["entries"] if options.output.exists() else []
    tasks = []
    for name in options.workloads.split(","):
        w = WORKLOADS[name]
        for implementation in options.implementations.split(","):
            if implementation != "mosaic" or not mosaic.unsupported(w.spec):
                tasks.append((w, implementation))
    new: list[dict[str, Any]] = []
    for _, entry in each(tune, tasks, options.jobs):
        new.append(entry)
        text = json.dumps({"entries": merged(old, new)}, indent=1) + "\n"
        tuning.parse(text, str(options.output))
        options.output.write_text(text)


if __name__ == "__main__":
    main()
