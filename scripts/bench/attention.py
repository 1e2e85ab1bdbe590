"""Speed, memory and error of attention implementations on the workloads.

    python -m scripts.bench.attention --implementations=short,mosaic,triton,xla
        --record=experiments/results/attention_h200.json
    python -m scripts.bench.attention --implementations=mosaic,triton,xla,mosaic_fp8
        --lengths=1024,2048,4096,16384,32768 --rival=PATH
        --record=experiments/results/attention_h100.json

`--rival` is a checkout of the public generative-recommenders; it and cuDNN are measured beside
ours, see attention_rivals.py.

Times are device time with inputs on the device; lists of work and tile bounds are made beforehand
and their cost is a column of its own. FLOPs are useful ones: unmasked pairs, the backward 2.5 times
the forward. `--lengths` adds causal sequences of one length each, 65536 rows, width 128, for
`mosaic` and `triton`: the figure of docs/results.md.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int

from experiments import command
from experiments.record import Json, Record
from kernels.hstu_attention import hstu_attention, make_plan, prepare_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import chained, device_time
from scripts.bench.terminal import show
from scripts.bench.turns import each, preparing, turn
from ultra_hstu import report

FLAGS = flags.FLAGS
COLUMNS = ("ms", "tflops", "of_matmul", "gb_s", "peak_mib", "plan_us", "error")
LENGTHS = "1024,2048,4096,16384,32768"  # 8192 is one of the workloads
# Kernels of fewer FLOPs are timed several to a program: their dispatch may take longer than they.
BRIEF, CALLS = 1.5e11, 16

KERNELS = ("short", "mosaic", "mosaic_fp8", "triton")
# Of each array, (index, float64) of what is compared.
Index = slice | tuple[int, int]
Expected = dict[str, list[tuple[Index, np.ndarray]]]
Arrays = dict[str, Array]
Pass = Callable[[AttentionPlan, Array, Array, Array, Array], Arrays]  # of (plan, q, k, v, g)


def of_length(length: int, rows: int = 65536) -> Workload:
    return Workload(
        f"length_{length}", (length,) * (rows // length), 4, 128, 128, max_length=length
    )


def matmul_tflops(size: int = 8192) -> float:
    """What a plain bfloat16 product reaches in this run: the yardstick of `of_matmul`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    tuned = {"xla_gpu_autotune_level": 4}  # whatever XLA_FLAGS say for the rest
    return device_time(
        jax.jit(jnp.matmul).lower(a, b).compile(compiler_options=tuned), a, b
    ).tflops(2.0 * size**3)


def silu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate = 1 / (1 + np.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


def expected(w: Workload, arrays: Arrays, samples: int = 8) -> Expected:
    """Some rows of the output (or keys, for gradients) in float64 on the host.

    With a relative bias: all rows, of `xla` in float32.
    """
    if w.bias:
        with jax.default_matmul_precision("highest"):
            plan = jax.jit(planner(w, "xla"))(jnp.asarray(w.offsets()))
            wide = (arrays[name].astype(jnp.float32) for name in "qkvg")
            found = jax.jit(passes(w, "xla")["both"])(plan, *wide)
        return {name: [(slice(None), np.asarray(x, np.float64))] for name, x in found.items()}
    q, k, v, g = (np.asarray(arrays[name]) for name in "qkvg")
    alpha, scale, offsets = w.alpha, w.scale, w.offsets()
    lo0, hi0, lo1, hi1 = (np.asarray(x) for x in w.mask.intervals(offsets, w.rows))
    place = np.arange(w.rows)
    want: Expected = {name: [] for name in ("out", "dq", "dk", "dv")}
    for sample, at in enumerate(np.linspace(0, offsets[-1] - 1, samples).astype(int)):
        head = sample % w.heads
        seen = (
            ((place >= lo0[at]) & (place < hi0[at]))
            | ((place >= lo1[at]) & (place < hi1[at]))
            | (place == at)
        )
        seers = ((lo0 <= at) & (at < hi0)) | ((lo1 <= at) & (at < hi1)) | (place == at)
        row = {
            name: x[at, head].astype(np.float64)
            for name, x in zip("qkvg", (q, k, v, g), strict=True)
        }
        keys, values, queries, outs = (
            x[s, head].astype(np.float64) for x, s in ((k, seen), (v, seen), (q, seers), (g, seers))
        )
        weight, slope = silu_and_slope(alpha * keys @ row["q"])
        back, back_slope = silu_and_slope(alpha * queries @ row["k"])
        values_of = {
            "out": scale * weight @ values,
            "dq": alpha * scale * (slope * (values @ row["g"])) @ keys,
            "dk": alpha * scale * (back_slope * (outs @ row["v"])) @ queries,
            "dv": scale * back @ outs,
        }
        for name, value in values_of.items():
            want[name].append(((at, head), value))
    return want


def error(got: Arrays, want: Expected) -> float:
    """Largest relative error of what was sampled."""
    worst = 0.0
    for name, x in got.items():
        host = np.asarray(x)
        for index, value in want[name]:
            off = np.linalg.norm(host[index].astype(np.float64) - value)
            worst = max(worst, float(off / np.linalg.norm(value)))
    return worst


def passes(w: Workload, implementation: str) -> dict[str, Pass]:
    """Forward, backward (which leaves the output unused, so that XLA drops the forward), both."""
    bias, offsets = w.relative_bias(), jnp.asarray(w.offsets())

    def attend(plan: AttentionPlan, q: Array, k: Array, v: Array) -> Array:
        return hstu_attention(
            q,
            k,
            v,
            offsets,
            mask=w.mask,
            alpha=w.alpha,
            scale=w.scale,
            bias=bias,
            plan=plan,
            implementation=implementation,
        )

    def forward(plan: AttentionPlan, q: Array, k: Array, v: Array, g: Array) -> Arrays:
        return {"out": attend(plan, q, k, v)}

    def both(plan: AttentionPlan, q: Array, k: Array, v: Array, g: Array) -> Arrays:
        out, pull = jax.vjp(functools.partial(attend, plan), q, k, v)
        if w.rows > sum(w.lengths):
            g = jnp.where(jnp.arange(w.rows)[:, None, None] < offsets[-1], g, 0)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), pull(g), strict=True))}

    def backward(plan: AttentionPlan, q: Array, k: Array, v: Array, g: Array) -> Arrays:
        return {name: x for name, x in both(plan, q, k, v, g).items() if name != "out"}

    return {"forward": forward, "backward": backward, "both": both}


def planner(w: Workload, implementation: str) -> Callable[[Int[Array, " B1"]], AttentionPlan]:
    return lambda offsets: prepare_plan(
        make_plan(w.mask, offsets, w.rows, longest=w.max_length), w.spec, implementation
    )


class ReadyWorkload(NamedTuple):
    """What is compiled and computed before a workload is measured."""

    planners: list[jax.stages.Compiled]  # as in `programs`
    programs: dict[str, list[jax.stages.Compiled]]  # by pass: it, and perhaps several of it
    tensors: list[Float[Array, "T H X"]]
    want: Expected
    refused: list[Json]  # records of what the implementation cannot do


def prepare(w: Workload, implementation: str) -> ReadyWorkload:
    offsets = jax.ShapeDtypeStruct((len(w.lengths) + 1,), jnp.int32)
    q, v = (
        jax.ShapeDtypeStruct((w.rows, w.heads, width), w.dtype) for width in (w.k_width, w.v_width)
    )
    ready = ReadyWorkload([], {}, [], {}, [])
    name = "forward"
    try:
        make = planner(w, implementation)
        for f in (make, chained(make, CALLS)):
            ready.planners.append(jax.jit(f).lower(offsets).compile())
        inputs = (jax.eval_shape(make, offsets), q, q, v, v)
        brief = implementation in KERNELS and w.forward_flops < BRIEF
        for name in ("forward", "backward"):
            run = passes(w, implementation)[name]
            ready.programs[name] = [
                jax.jit(f).lower(*inputs).compile()
                for f in ((run, chained(run, CALLS)) if brief else (run,))
            ]
    except NotImplementedError as reason:
        what = {"workload": w.name, "implementation": implementation, "pass": name}
        ready.refused.append(what | {"reason": str(reason)})
    if not ready.programs:
        return ready
    arrays = jax.jit(w.arrays)()
    return ready._replace(tensors=[arrays[name] for name in "qkvg"], want=expected(w, arrays))


def measure(w: Workload, implementation: str, matmul: float) -> list[Json]:
    """A record for each pass; one with the reason where the implementation cannot."""
    with preparing():
        ready = prepare(w, implementation)
    records = ready.refused
    if not ready.programs:
        return records
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    with turn():
        offsets = jnp.asarray(w.offsets())
        plan = ready.planners[0](offsets)
        plan_us = 1e6 * device_time(ready.planners[1], offsets).seconds / CALLS
        for name, program in ready.programs.items():
            found = error(program[0](plan, *ready.tensors), ready.want)
            calls = CALLS if len(program) > 1 else 1
            seconds = device_time(program[-1], plan, *ready.tensors).seconds / calls
            memory = program[0].memory_analysis()
            forward = name == "forward"
            tflops = (w.forward_flops if forward else w.backward_flops) / seconds / 1e12
            moved = w.forward_bytes * (1 if forward else 2)
            records.append(
                {
                    "workload": w.name,
                    "implementation": implementation,
                    "pass": name,
                    "ms": seconds * 1e3,
                    "tflops": tflops,
                    "of_matmul": tflops / matmul,
                    "gb_s": moved / seconds / 1e9,
                    "peak_mib": memory and sum(getattr(memory, size) for size in sizes) / 2**20,
                    "plan_us": plan_us,
                    "error": found,
                }
            )
    return records


def rivals(
    checkout: pathlib.Path,
    workloads: Sequence[Workload],
    matmul: float,
    seconds: float,
    cache: str | None = None,
) -> tuple[Json, list[Json]]:
    """(versions, records) of `attention_rivals`, which runs for so many seconds at most.

    It has a process of its own.
    """
    fields = ("name", "lengths", "heads", "k_width", "v_width", "max_length")
    taken = {w.name: w for w in workloads if not w.bias and w.mask.in_one_piece}
    wanted = [
        {field: getattr(w, field) for field in fields} | {"window": w.mask.window}
        for w in taken.values()
    ]
    script = pathlib.Path(__file__).with_name("attention_rivals.py")
    environment = dict(os.environ)
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(pathlib.Path(cache).resolve())
    versions: Json = {}
    with tempfile.TemporaryFile("w+") as answers:
        try:
            subprocess.run(
                [sys.executable, str(script)],
                input=json.dumps({"checkout": str(checkout.resolve()), "workloads": wanted}),
                stdout=answers,
                text=True,
                check=True,
                timeout=seconds,
                env=environment,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            versions["incomplete"] = f"ended early: {type(error).__name__}"
        answers.seek(0)
        lines = [
            json.loads(line.removeprefix("RECORD")) for line in answers if line.startswith("RECORD")
        ]
    records = [record for record in lines if "workload" in record]
    for record in records:
        if "ms" in record:
            w = taken[record["workload"]]
            flops = w.forward_flops if record["pass"] == "forward" else w.backward_flops
            record["tflops"] = flops / record["ms"] / 1e9
            record["of_matmul"] = record["tflops"] / matmul
    for record in lines:
        versions |= {} if "workload" in record else record
    return versions, records


def announce(record: Json) -> None:
    value = record.get("reason") or (
        "{ms:.3g} ms, {tflops:.3g} TFLOP/s, error {error}".format(**record)
    )
    what = f"{record['workload']}, {record['implementation']}, {record.get('pass', '')}"
    report.make_console().print(f"{what}: {value}")


def run(
    implementations: Sequence[str],
    workloads: Mapping[str, Workload],
    record: Record,
    jobs: int = 1,
    rival: Callable[[float], tuple[Json, list[Json]]] | None = None,
) -> None:
    """Measures all, and records each when it is there.

    Args:
      rival: measures what others' do, given what a matrix product reaches.
    """
    matmul = matmul_tflops()
    record.values["matmul_tflops"] = matmul
    tasks = [
        functools.partial(measure, w, name, matmul)
        for w in workloads.values()
        for name in implementations
        if name in ("mosaic", "triton") or not w.name.startswith("length_")
    ]
    found: list[list[Json]] = [[] for _ in tasks]
    for number, records in each(tasks, jobs):
        found[number] = records
        for one in records:
            announce(one)
        record.add(records=sum(found, []))
    if rival is not None:
        versions, records = rival(matmul)
        for one in records:
            announce(one)
        record.add(records=sum(found, []) + records, rivals=versions)
    rows = {
        "{workload}, {implementation}, {pass}".format(**one): one
        for one in record.values["records"]
        if "ms" in one
    }
    show(rows, COLUMNS)
    report.make_console().print(f"bfloat16 matmul: {matmul:.0f} TFLOP/s")


def main(_: list[str]) -> None:
    lengths = [of_length(int(length)) for length in FLAGS.lengths]
    workloads = {name: WORKLOADS[name] for name in FLAGS.workloads} | {w.name: w for w in lengths}

    def rival(matmul: float) -> tuple[Json, list[Json]]:
        versions, records = rivals(
            pathlib.Path(FLAGS.rival),
            list(workloads.values()),
            matmul,
            FLAGS.rival_seconds,
            FLAGS.rival_cache,
        )
        return versions | {"revision": FLAGS.rival_revision}, records

    record = Record(FLAGS.record)
    run(FLAGS.implementations, workloads, record, FLAGS.jobs, rival if FLAGS.rival else None)


if __name__ == "__main__":
    flags.DEFINE_list("implementations", ["short", "mosaic", "triton", "xla"], "names")
    flags.DEFINE_list("workloads", list(WORKLOADS), "names of kernels.hstu_attention.workloads")
    flags.DEFINE_list("lengths", [], f"for the figure: {LENGTHS}")
    flags.DEFINE_string("rival", None, "checkout of the public generative-recommenders repository")
    flags.DEFINE_float("rival_seconds", 1800.0, "what was not measured by then is left out")
    flags.DEFINE_string(
        "rival_cache",
        None,
        "where its compiled kernels stay; the default folder is emptied by jax-triton",
    )
    flags.DEFINE_string("rival_revision", "unknown", "its commit, for the record")
    flags.DEFINE_integer(
        "jobs",
        1,
        "processes that compile side by side; more than 1 need XLA_PYTHON_CLIENT_PREALLOCATE=false",
    )
    command.define_record()
    flags.DEFINE_alias("output", "record")
    command.run(main)
