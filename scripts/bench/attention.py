"""Speed, memory and error of attention implementations on the workloads: a table on the terminal, and JSON.

    python -m scripts.bench.attention --implementations mosaic,triton,xla --output experiments/results/attention_h100.json
    python -m scripts.bench.attention --rival PATH   # beside the public generative-recommenders (a checkout) and cuDNN, see attention_rivals.py

Times are device time with inputs on the device; lists of work and tile bounds are made beforehand and their cost is a column of its own. FLOPs are
useful ones: unmasked pairs, the backward 2.5 times the forward. `--lengths` adds causal sequences of one length each, 65536 rows, width 128, for
`mosaic` and `triton`: the figure of the README.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kernels.hstu_attention import hstu_attention, make_plan, prepare_plan
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import chained, device_time
from scripts.bench.turns import each, preparing, turn
from ultra_hstu.provenance import provenance

COLUMNS = (
    "workload",
    "implementation",
    "pass",
    "ms",
    "tflops",
    "of_matmul",
    "gb_s",
    "peak_mib",
    "plan_us",
    "error",
)
LENGTHS = "1024,2048,4096,16384,32768"  # 8192 is one of the workloads
BRIEF, CALLS = (
    1.5e11,
    16,
)  # kernels of fewer FLOPs are timed several to a program: their dispatch may take longer than they do

KERNELS = ("mosaic", "mosaic_fp8", "triton")
Expected = dict[
    str, list[tuple[Any, np.ndarray]]
]  # of each array, (index, float64) of what is compared


def of_length(length: int, rows: int = 65536) -> Workload:
    return Workload(
        f"length_{length}", (length,) * (rows // length), 4, 128, 128, max_length=length
    )


def matmul_tflops(size: int = 8192) -> float:
    """What a plain bfloat16 product of random matrices reaches in this run: the yardstick of `of_matmul`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    tuned = {"xla_gpu_autotune_level": 4}  # whatever XLA_FLAGS say for the rest
    return device_time(
        jax.jit(jnp.matmul).lower(a, b).compile(compiler_options=tuned), a, b
    ).tflops(2.0 * size**3)


def silu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate = 1 / (1 + np.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


def expected(w: Workload, arrays: dict[str, jax.Array], samples: int = 8) -> Expected:
    """Some rows of the output (or keys, for gradients) in float64 on the host; with a relative bias, all of them, of `xla` in float32."""
    if w.bias:
        with jax.default_matmul_precision("highest"):
            plan = jax.jit(planner(w, "xla"))(jnp.asarray(w.offsets()))
            found = jax.jit(passes(w, "xla")["both"])(plan, *(arrays[name] for name in "qkvg"))
        return {name: [(slice(None), np.asarray(x, np.float64))] for name, x in found.items()}
    q, k, v, g = (np.asarray(arrays[name]) for name in "qkvg")
    alpha, scale, offsets = w.k_width**-0.5, 1 / w.max_length, w.offsets()
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


def error(got: dict[str, jax.Array], want: Expected) -> float:
    """Largest relative error of what was sampled."""
    worst = 0.0
    for name, x in got.items():
        host = np.asarray(x)
        for index, value in want[name]:
            worst = max(
                worst,
                float(
                    np.linalg.norm(host[index].astype(np.float64) - value) / np.linalg.norm(value)
                ),
            )
    return worst


def passes(w: Workload, implementation: str) -> dict[str, Callable[..., dict[str, jax.Array]]]:
    """Functions of (plan, q, k, v, g): forward, backward (which leaves the forward's output unused, so that XLA drops it), both."""
    bias, offsets = w.relative_bias(), jnp.asarray(w.offsets())

    def attend(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
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

    def forward(
        plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array
    ) -> dict[str, jax.Array]:
        return {"out": attend(plan, q, k, v)}

    def both(
        plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array
    ) -> dict[str, jax.Array]:
        out, pull = jax.vjp(functools.partial(attend, plan), q, k, v)
        g = (
            jnp.where(jnp.arange(w.rows)[:, None, None] < offsets[-1], g, 0)
            if w.rows > sum(w.lengths)
            else g
        )
        return {"out": out, **dict(zip(("dq", "dk", "dv"), pull(g), strict=True))}

    def backward(*args: Any) -> dict[str, jax.Array]:
        return {name: x for name, x in both(*args).items() if name != "out"}

    return {"forward": forward, "backward": backward, "both": both}


def planner(w: Workload, implementation: str) -> Callable[[Any], Any]:
    return lambda offsets: prepare_plan(make_plan(w.mask, offsets, w.rows), w.spec, implementation)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Prepared(NamedTuple):
    """A workload that is ready to be measured: compiled programs, inputs, what is expected, records of what an implementation cannot."""

    planners: list[Any]  # as in `programs`
    programs: dict[str, list[Any]]  # by pass: [the pass] or [the pass, several of it]
    offsets: jax.Array
    tensors: list[jax.Array]
    want: Expected
    refused: list[dict[str, Any]]


def prepare(w: Workload, implementation: str) -> Prepared:
    offsets = jnp.asarray(w.offsets())
    q, v = (
        jax.ShapeDtypeStruct((w.rows, w.heads, width), w.dtype) for width in (w.k_width, w.v_width)
    )
    programs: dict[str, Any] = {}
    refused: list[dict[str, Any]] = []
    planners: list[Any] = []
    try:
        make = planner(w, implementation)
        planners = [
            jax.jit(f).lower(abstract(offsets)).compile() for f in (make, chained(make, CALLS))
        ]
        inputs = (abstract(jax.eval_shape(make, offsets)), q, q, v, v)
        for name in ("forward", "backward"):
            run = passes(w, implementation)[name]
            brief = implementation in KERNELS and w.forward_flops < BRIEF
            programs[name] = [
                jax.jit(f).lower(*inputs).compile()
                for f in ((run, chained(run, CALLS)) if brief else (run,))
            ]
    except NotImplementedError as reason:
        name = "backward" if "forward" in programs else "forward"
        refused.append(
            {
                "workload": w.name,
                "implementation": implementation,
                "pass": name,
                "reason": str(reason),
            }
        )
        if not programs:
            return Prepared(planners, programs, offsets, [], {}, refused)
    arrays = jax.jit(w.arrays)()
    return Prepared(
        planners, programs, offsets, [arrays[name] for name in "qkvg"], expected(w, arrays), refused
    )


def measure(w: Workload, implementation: str, matmul: float) -> list[dict[str, Any]]:
    """A record for each pass; one with the reason where the implementation cannot."""
    with preparing():
        ready = prepare(w, implementation)
    records = ready.refused
    if not ready.programs:
        return records
    with turn():
        plan = ready.planners[0](ready.offsets)
        plan_us = 1e6 * device_time(ready.planners[1], ready.offsets).seconds / CALLS
        for name, program in ready.programs.items():
            found = error(program[0](plan, *ready.tensors), ready.want)
            seconds = device_time(program[-1], plan, *ready.tensors).seconds / (
                CALLS if len(program) > 1 else 1
            )
            memory = program[0].memory_analysis()
            sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
            flops, moved = (
                (w.forward_flops, w.forward_bytes)
                if name == "forward"
                else (w.backward_flops, 2 * w.forward_bytes)
            )
            records.append(
                {
                    "workload": w.name,
                    "implementation": implementation,
                    "pass": name,
                    "ms": seconds * 1e3,
                    "tflops": flops / seconds / 1e12,
                    "of_matmul": flops / seconds / 1e12 / matmul,
                    "gb_s": moved / seconds / 1e9,
                    "peak_mib": None
                    if memory is None
                    else sum(getattr(memory, size) for size in sizes) / 2**20,
                    "plan_us": plan_us,
                    "error": found,
                }
            )
    return records


def rivals(
    checkout: pathlib.Path,
    workloads: list[Workload],
    matmul: float,
    seconds: float,
    cache: pathlib.Path | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(versions, records) of `attention_rivals`, which runs in a process of its own, for so many seconds at most."""
    fields = ("name", "lengths", "heads", "k_width", "v_width", "max_length")
    taken = {w.name: w for w in workloads if not w.bias and w.mask.full_rows == w.mask.prefix == 0}
    asked = [
        {field: getattr(w, field) for field in fields} | {"window": w.mask.window}
        for w in taken.values()
    ]
    script = pathlib.Path(__file__).with_name("attention_rivals.py")
    request = json.dumps({"checkout": str(checkout.resolve()), "workloads": asked})
    environment = os.environ | ({} if cache is None else {"TRITON_CACHE_DIR": str(cache.resolve())})
    with tempfile.TemporaryFile("w+") as answer:
        try:
            run = [sys.executable, str(script)]
            subprocess.run(
                run,
                input=request,
                stdout=answer,
                text=True,
                check=True,
                timeout=seconds,
                env=environment,
            )
            ended = {}
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            ended = {"incomplete": f"ended early: {type(error).__name__}"}
        answer.seek(0)
        said = [
            json.loads(line.removeprefix("RECORD")) for line in answer if line.startswith("RECORD")
        ]
    records = [record for record in said if "workload" in record]
    for record in records:
        if "ms" in record:
            w = taken[record["workload"]]
            flops = w.forward_flops if record["pass"] == "forward" else w.backward_flops
            record["tflops"] = flops / record["ms"] / 1e9
            record["of_matmul"] = record["tflops"] / matmul
    return {
        name: x for record in said if "workload" not in record for name, x in record.items()
    } | ended, records


def table(records: list[dict[str, Any]]) -> Table:
    out = Table(*COLUMNS)
    for record in records:
        cells = (record.get(name) for name in COLUMNS)
        out.add_row(
            *("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
        )
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--implementations", default="mosaic,triton,xla", help="names, with commas between"
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--lengths", default="", help=f"for the figure: {LENGTHS}")
    parser.add_argument(
        "--rival",
        type=pathlib.Path,
        help="checkout of the public generative-recommenders repository",
    )
    parser.add_argument(
        "--rival-seconds",
        type=float,
        default=1800.0,
        help="what was not measured by then is left out",
    )
    parser.add_argument(
        "--rival-cache",
        type=pathlib.Path,
        help="where its compiled kernels stay; the default folder is emptied by jax-triton",
    )
    parser.add_argument("--rival-revision", default="unknown", help="its commit, for the record")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes that compile side by side; XLA_PYTHON_CLIENT_PREALLOCATE=false with more than 1",
    )
    parser.add_argument("--output", type=pathlib.Path, help="where the JSON goes")
    options = parser.parse_args(arguments)

    console = Console(width=170)
    matmul = matmul_tflops()
    lengths = [of_length(int(length)) for length in options.lengths.split(",") if length]
    workloads = [*(WORKLOADS[name] for name in options.workloads.split(",") if name), *lengths]
    result: dict[str, Any] = {
        **provenance(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_tflops": matmul,
        "records": [],
    }
    found: dict[int, list[dict[str, Any]]] = {}

    def add(number: int, records: list[dict[str, Any]]) -> None:
        found[number] = records
        result["records"] = [record for number in sorted(found) for record in found[number]]
        for record in records:
            value = (
                record.get("reason")
                or f"{record['ms']:.3g} ms, {record['tflops']:.3g} TFLOP/s, error {record['error']}"
            )
            console.print(
                f"{record['workload']}, {record['implementation']}, {record.get('pass', '')}: {value}"
            )
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    names = [name for name in options.implementations.split(",") if name]
    tasks = [
        (WORKLOADS[w], name, matmul) for w in options.workloads.split(",") if w for name in names
    ]
    tasks += [(w, name, matmul) for w in lengths for name in names if name in ("mosaic", "triton")]
    for number, records in each(measure, tasks, options.jobs):
        add(number, records)
    if options.rival is not None:
        versions, records = rivals(
            options.rival, workloads, matmul, options.rival_seconds, options.rival_cache
        )
        result["rivals"] = versions | {"revision": options.rival_revision}
        add(len(tasks), records)
    console.print(table([record for record in result["records"] if "ms" in record]))
    console.print(f"bfloat16 matmul: {matmul:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
