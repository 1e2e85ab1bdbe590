"""Finds the fastest sizes of the attention kernels on this GPU, for the table that they read.

    python -m scripts.tune_attention --implementations=triton,mosaic
        --workloads=causal_d128_4x8192,ml1m

Each kernel of each workload is timed with every candidate; the winner's output and gradients are
checked before the table (`kernels/hstu_attention/tuning.json`) is written. An entry replaces the
one of the same key; others stay.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array

from experiments import command
from experiments.record import Json
from kernels import device
from kernels.hstu_attention import make_plan, tuning
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.hstu_attention.mosaic import backward as mosaic_backward
from kernels.hstu_attention.mosaic import forward as mosaic_forward
from kernels.hstu_attention.mosaic.schedule import WorkList, make_schedules
from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.hstu_attention.triton import attention as triton
from kernels.hstu_attention.triton.sizes import LaunchSizes, heuristic
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import chained, device_time
from kernels.triton_call import padded
from scripts.bench import attention as bench_attention
from scripts.bench.turns import each, preparing, turn
from ultra_hstu.provenance import provenance

FLAGS = flags.FLAGS
NAMES = (
    "causal_d64_4x8192",
    "causal_d128_4x8192",
    "causal_d256_4x8192",
    "window_d128_2x16384",
    "short_d64_512x100",
    "ml1m",
    "ml1m_large",
)
CALLS = 10  # in one program: kernels of the short workloads take less time than their dispatch
# Error of the winner by bytes of an element; float32 products are TF32.
ALLOWED = {2: 2e-2, 4: 5e-3}

Sizes = dict[str, int]
# Candidates: block_q, block_k, warps, stages, by bytes of an element, width and kernel.
TRITON = """
2  64 forward 128,64,4,3  64,64,4,3  64,64,4,4  128,64,4,4  128,128,8,3
2  64 queries 64,64,4,2   64,64,4,3  64,128,4,2 128,64,8,3
2  64 keys    64,64,4,2   64,64,4,3  128,64,4,2 32,64,4,3
2 128 forward 64,64,4,3   128,64,8,3 64,64,4,4  64,128,4,2
2 128 queries 64,64,4,2   64,64,4,3  128,64,8,3
2 128 keys    64,64,4,2   64,64,4,3  32,64,4,3  64,128,8,3
2 256 forward 128,64,8,2  64,32,4,3  128,32,8,3
2 256 queries 64,32,4,2   128,32,8,2 128,64,8,1 64,64,4,1
2 256 keys    32,64,8,2   32,128,8,1 32,128,8,2 64,128,8,1  64,64,4,1
4  32 forward 32,32,2,2   32,32,4,2  16,32,2,2  16,32,1,2   32,32,1,2
4  32 queries 32,32,2,2   32,32,4,2  16,32,2,2  16,32,1,2
4  32 keys    32,32,2,2   32,32,4,2  32,16,2,2  32,16,1,2
4  64 forward 32,32,4,2   16,32,2,2  32,32,2,2  16,16,2,2
4  64 queries 32,32,4,2   16,32,2,2  32,16,4,2  16,16,2,2
4  64 keys    32,32,4,2   32,16,2,2  16,32,4,2  16,16,2,2
"""
PASSES: list[Sizes] = [{"passes": 1}, {"passes": 2}]
MOSAIC: dict[int, dict[str, list[Sizes]]] = {
    64: {
        "forward": [{"block_k": 128, "stages": 4}, {"block_k": 64, "stages": 4}],
        "backward": PASSES,
    },
    128: {
        "forward": [
            {"block_k": 128, "stages": 2},
            {"block_k": 64, "stages": 4},
            {"block_k": 64, "stages": 3},
        ],
        "backward": PASSES,
    },
    256: {"forward": [{"block_k": 64, "stages": 2, "q_slots": 1}], "backward": PASSES},
}


class Trial(NamedTuple):
    """A candidate: its sizes, a function of (plan, q, k, v, g) that runs it, the plan it wants."""

    sizes: Sizes
    run: Callable[[AttentionPlan, Array, Array, Array, Array], Any]
    plan: AttentionPlan


def triton_trials(
    w: Workload, plan: AttentionPlan, bias: RelativeBias | None
) -> Iterable[tuple[str, list[Trial]]]:
    """For each kernel, its candidates."""
    size, width = jnp.dtype(w.dtype).itemsize, padded(max(w.k_width, w.v_width, 32))
    capability = device.current().compute_capability
    assert capability is not None, "the tuner runs on a GPU"
    default = heuristic(capability, w.spec)

    def made(kernel: str, launch: LaunchSizes) -> Trial:
        sizes = default._replace(**{kernel: launch})
        call = triton.TritonCall(w.alpha, "tf32", sizes)

        def run(plan: AttentionPlan, q: Array, k: Array, v: Array, g: Array) -> Any:
            tables, rows = triton.tables_and_rows(plan, w.scale, bias)
            if kernel == "forward":
                return triton.forward(call, (q, k, v), tables, rows)
            gradients = triton.query_gradients if kernel == "queries" else triton.key_gradients
            return gradients(call, (q, k, v), tables, rows, g)

        ready = jax.jit(lambda: triton.prepare_for(plan, w.heads, sizes))()
        return Trial(launch._asdict(), run, ready)

    for line in TRITON.strip().splitlines():
        of_size, of_width, kernel, *candidates = line.split()
        if (int(of_size), int(of_width)) == (size, width):
            launches = [LaunchSizes(*map(int, text.split(","))) for text in candidates]
            yield kernel, [made(kernel, launch) for launch in launches]


def mosaic_trials(
    w: Workload, plan: AttentionPlan, bias: RelativeBias | None
) -> Iterable[tuple[str, list[Trial]]]:
    width, scale = max(w.k_width, w.v_width), jnp.float32(w.scale)

    def with_lists(*wanted: WorkList) -> AttentionPlan:
        return jax.jit(lambda: plan.storing(wanted, make_schedules(plan, wanted)))()

    def forward(sizes: Sizes) -> Trial:
        config = dataclasses.replace(mosaic_forward.forward_config(w.spec, plan), **sizes)
        ready = with_lists(WorkList.forward(w.heads, config.block_k))
        return Trial(
            sizes,
            lambda plan, q, k, v, g: mosaic_forward.forward(q, k, v, plan, scale, w.alpha, config),
            ready,
        )

    def backward(sizes: Sizes) -> Trial:
        config = mosaic_backward.backward_config(w.spec, plan, **sizes)
        ready = with_lists(*mosaic_backward.work_lists(w.heads, config))
        return Trial(
            sizes,
            lambda plan, q, k, v, g: mosaic_backward.gradients(
                q, k, v, g, plan, scale, w.alpha, config
            ),
            ready,
        )

    yield "forward", [forward(c) for c in MOSAIC[width]["forward"]]
    yield "backward", [backward(c) for c in MOSAIC[width]["backward"]]


TRIALS = {"triton": triton_trials, "mosaic": mosaic_trials}


def fastest(name: str, trials: list[Trial], arrays: list[Array]) -> tuple[Sizes, float]:
    """(sizes, microseconds) of the winner. What does not compile, or does not fit, is out."""

    def attempt[R](trial: Trial, action: Callable[[], R]) -> R | None:
        try:
            return action()
        except (RuntimeError, ValueError) as error:
            print(f"{name} {trial.sizes}: {str(error).splitlines()[0][:120]}", flush=True)
            return None

    def compiled(trial: Trial) -> jax.stages.Compiled:
        return jax.jit(chained(trial.run, CALLS)).lower(trial.plan, *arrays).compile()

    def timed(trial: Trial, program: jax.stages.Compiled) -> float:
        timing = device_time(program, trial.plan, *arrays, repetitions=5, sample_seconds=0.01)
        micros = 1e6 * timing.seconds / CALLS
        print(f"{name} {trial.sizes}: {micros:.1f} us", flush=True)
        return micros

    with preparing():
        programs = [attempt(trial, functools.partial(compiled, trial)) for trial in trials]
    times = []
    with turn():
        for trial, program in zip(trials, programs, strict=True):
            if program is not None:
                micros = attempt(trial, functools.partial(timed, trial, program))
                times += [] if micros is None else [(trial.sizes, micros)]
    if not times:
        raise RuntimeError(
            f"{name}: no candidate ran; add some to TRITON or MOSAIC in scripts/tune_attention.py"
        )
    return min(times, key=lambda pair: pair[1])


def tune(w: Workload, implementation: str) -> Json:
    """The entry of a workload, put into the table that this process's kernels read, and checked."""
    with preparing():
        plan = jax.jit(lambda offsets: make_plan(w.mask, offsets, w.rows))(jnp.asarray(w.offsets()))
        arrays = jax.jit(w.arrays)()
        trials = list(TRIALS[implementation](w, plan, w.relative_bias()))
    tensors = [arrays[name] for name in "qkvg"]
    chosen = {
        kernel: fastest(f"{w.name} {implementation} {kernel}", candidates, tensors)
        for kernel, candidates in trials
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
            f"{w.name}: {implementation} has error {entry['error']:.1e} with {entry['sizes']}, "
            f"allowed {ALLOWED[key.bytes]}"
        )
    return entry | {"made": {name: provenance()[name] for name in ("versions", "commit", "date")}}


def error_of(
    w: Workload, implementation: str, plan: AttentionPlan, arrays: bench_attention.Arrays
) -> float:
    """The largest error of output and gradients, with the sizes that the table gives."""
    run = jax.jit(bench_attention.passes(w, implementation)["both"])
    found = run(plan, *(arrays[name] for name in "qkvg"))
    return bench_attention.error(found, bench_attention.expected(w, arrays))


def merged(old: list[Json], new: list[Json]) -> list[Json]:
    """Entries by key, new ones in place of old ones, sorted."""
    by_key = {tuple(entry[name] for name in tuning.Key._fields): entry for entry in [*old, *new]}
    return [by_key[key] for key in sorted(by_key)]


def main(_: list[str]) -> None:
    path = Path(FLAGS.output)
    old = json.loads(path.read_text())["entries"] if path.exists() else []
    tasks = []
    for name in FLAGS.workloads:
        w = WORKLOADS[name]
        for implementation in FLAGS.implementations:
            if implementation != "mosaic" or not mosaic.unsupported(w.spec):
                tasks.append(functools.partial(tune, w, implementation))
    new: list[Json] = []
    for _number, entry in each(tasks, FLAGS.jobs):
        new.append(entry)
        text = json.dumps({"entries": merged(old, new)}, indent=1) + "\n"
        tuning.parse(text, str(path))
        path.write_text(text)


if __name__ == "__main__":
    flags.DEFINE_list("implementations", ["triton", "mosaic"], "names")
    flags.DEFINE_list("workloads", list(NAMES), "names of kernels.hstu_attention.workloads")
    flags.DEFINE_integer(
        "jobs",
        1,
        "processes that compile side by side; more than 1 need XLA_PYTHON_CLIENT_PREALLOCATE=false",
    )
    flags.DEFINE_string("output", str(tuning.PATH), "the table")
    command.run(main)
