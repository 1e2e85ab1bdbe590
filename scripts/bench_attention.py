"""Speed, memory and error of attention implementations on the workloads: a table on the terminal, and JSON.

    python -m scripts.bench_attention --implementations mosaic,triton,xla --output experiments/results/attention_h200.json
    python -m scripts.bench_attention --rival PATH   # beside the public generative-recommenders (a checkout) and cuDNN, see attention_rivals.py

Times are device time with inputs on the device; lists of work and tile bounds are made beforehand and their cost is a column of its own. FLOPs are
useful ones: unmasked pairs, the backward 2.5 times the forward. `--lengths` adds causal sequences of one length each, 65536 rows, width 128: the
figure of the README.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kernels.hstu_attention import hstu_attention, make_plan, mosaic_fp8, mosaic_hopper, triton
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import chained, device_time
from ultra_hstu.provenance import provenance

COLUMNS = ("workload", "implementation", "pass", "ms", "tflops", "of_matmul", "gb_s", "peak_mib", "plan_us", "error")
LENGTHS = "1024,2048,4096,8192,16384,32768"
SHORT, CALLS = 2e-4, 16  # a call of fewer seconds is timed as one of several in a program: its dispatch would take longer

PREPARE: dict[str, Callable[[Any, Workload], Any]] = {
    "mosaic": lambda plan, w: mosaic_hopper.prepare(plan, w.heads, w.k_width, w.v_width),
    "mosaic_fp8": lambda plan, w: mosaic_fp8.prepare(plan, w.heads),
    "triton": lambda plan, w: triton.prepare(plan, w.heads, w.dtype, w.k_width, w.v_width),
}
Expected = dict[str, list[tuple[Any, np.ndarray]]]  # of each array, (index, float64) of what is compared


def of_length(length: int, rows: int = 65536) -> Workload:
    return Workload(f"length_{length}", (length,) * (rows // length), 4, 128, 128, max_length=length)


def matmul_tflops(size: int = 8192) -> float:
    """What a plain bfloat16 product of random matrices reaches in this run: the yardstick of `of_matmul`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return device_time(jax.jit(jnp.matmul), a, b).tflops(2.0 * size**3)


def silu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate = 1 / (1 + np.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


def expected(w: Workload, arrays: dict[str, jax.Array], samples: int = 8) -> Expected:
    """Some rows of the output (or keys, for gradients) in float64 on the host; with a relative bias, all of them, of `xla` in float32."""
    if w.bias:
        with jax.default_matmul_precision("highest"):
            found = jax.jit(functools.partial(passes(w, "xla")["both"], make_plan(w.mask, w.offsets(), w.rows)))(*arrays.values())
        return {name: [(slice(None), np.asarray(x, np.float64))] for name, x in found.items()}
    q, k, v, g = (np.asarray(arrays[name]) for name in "qkvg")
    alpha, scale, offsets = w.k_width**-0.5, 1 / w.max_length, w.offsets()
    lo0, hi0, lo1, hi1 = (np.asarray(x) for x in w.mask.intervals(offsets, w.rows))
    place = np.arange(w.rows)
    want: Expected = {name: [] for name in ("out", "dq", "dk", "dv")}
    for sample, at in enumerate(np.linspace(0, offsets[-1] - 1, samples).astype(int)):
        head = sample % w.heads
        seen = ((place >= lo0[at]) & (place < hi0[at])) | ((place >= lo1[at]) & (place < hi1[at])) | (place == at)
        seers = ((lo0 <= at) & (at < hi0)) | ((lo1 <= at) & (at < hi1)) | (place == at)
        row = {name: x[at, head].astype(np.float64) for name, x in zip("qkvg", (q, k, v, g), strict=True)}
        keys, values, queries, outs = (x[s, head].astype(np.float64) for x, s in ((k, seen), (v, seen), (q, seers), (g, seers)))
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
            worst = max(worst, float(np.linalg.norm(host[index].astype(np.float64) - value) / np.linalg.norm(value)))
    return worst


def passes(w: Workload, implementation: str) -> dict[str, Callable[..., dict[str, jax.Array]]]:
    """Functions of (plan, q, k, v, g): forward, backward (which leaves the forward's output unused, so that XLA drops it), both."""
    options, offsets = w.options(), jnp.asarray(w.offsets())

    def attend(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return hstu_attention(q, k, v, offsets, plan=plan, implementation=implementation, **options)

    def forward(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        return {"out": attend(plan, q, k, v)}

    def both(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        out, pull = jax.vjp(functools.partial(attend, plan), q, k, v)
        g = jnp.where(jnp.arange(w.rows)[:, None, None] < offsets[-1], g, 0) if w.rows > sum(w.lengths) else g
        return {"out": out, **dict(zip(("dq", "dk", "dv"), pull(g), strict=True))}

    def backward(*args: Any) -> dict[str, jax.Array]:
        return {name: x for name, x in both(*args).items() if name != "out"}

    return {"forward": forward, "backward": backward, "both": both}


def planner(w: Workload, implementation: str) -> Callable[[Any], Any]:
    prepare = PREPARE.get(implementation, lambda plan, w: plan)
    return lambda offsets: prepare(make_plan(w.mask, offsets, w.rows), w)


def measure(w: Workload, implementations: list[str], matmul: float) -> list[dict[str, Any]]:
    """A record for each implementation and pass; one with the reason where an implementation cannot."""
    arrays, offsets = w.arrays(), jnp.asarray(w.offsets())
    tensors = [arrays[name] for name in "qkvg"]
    want = expected(w, arrays)

    def compiled(task: tuple[str, str]) -> Any:
        """(plan, program, its like with several calls), or why not."""
        implementation, name = task
        try:
            plan = jax.jit(planner(w, implementation))(offsets)
            run = passes(w, implementation)[name]
            return plan, jax.jit(run).lower(plan, *tensors).compile(), jax.jit(chained(run, CALLS))
        except NotImplementedError as reason:
            return reason

    tasks = [(implementation, name) for implementation in implementations for name in ("forward", "backward")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(compiled, tasks))
    records: list[dict[str, Any]] = []
    for (implementation, name), program in zip(tasks, programs, strict=True):
        label = {"workload": w.name, "implementation": implementation, "pass": name}
        if isinstance(program, NotImplementedError):
            records.append(label | {"reason": str(program)})
            continue
        plan, run, several = program
        found = error(run(plan, *tensors), want)
        timing = device_time(run, plan, *tensors)
        seconds = timing.seconds if timing.seconds > SHORT else device_time(several, plan, *tensors).seconds / CALLS
        memory = run.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        flops, moved = (w.forward_flops, w.forward_bytes) if name == "forward" else (w.backward_flops, 2 * w.forward_bytes)
        records.append(
            label
            | {
                "ms": seconds * 1e3,
                "tflops": flops / seconds / 1e12,
                "of_matmul": flops / seconds / 1e12 / matmul,
                "gb_s": moved / seconds / 1e9,
                "peak_mib": None if memory is None else sum(getattr(memory, size) for size in sizes) / 2**20,
                "plan_us": 1e6 * device_time(jax.jit(planner(w, implementation)), offsets).seconds if name == "forward" else None,
                "error": found,
            }
        )
    return records


def rivals(checkout: pathlib.Path, workloads: list[Workload], matmul: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(versions, records) of `attention_rivals`, which runs in a process of its own."""
    fields = ("name", "lengths", "heads", "k_width", "v_width", "max_length")
    taken = {w.name: w for w in workloads if not w.bias and w.mask.full_rows == w.mask.prefix == 0}
    asked = [{field: getattr(w, field) for field in fields} | {"window": w.mask.window} for w in taken.values()]
    script = pathlib.Path(__file__).with_name("attention_rivals.py")
    request = json.dumps({"checkout": str(checkout.resolve()), "workloads": asked})
    done = subprocess.run([sys.executable, str(script)], input=request, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    for record in answer["records"]:
        if "ms" in record:
            w = taken[record["workload"]]
            flops = w.forward_flops if record["pass"] == "forward" else w.backward_flops
            record["tflops"] = flops / record["ms"] / 1e9
            record["of_matmul"] = record["tflops"] / matmul
    return {name: answer[name] for name in answer if name != "records"}, answer["records"]


def table(records: list[dict[str, Any]]) -> Table:
    out = Table(*COLUMNS)
    for record in records:
        cells = (record.get(name) for name in COLUMNS)
        out.add_row(*("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="mosaic,triton,xla", help="names, with commas between")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--lengths", default="", help=f"for the figure: {LENGTHS}")
    parser.add_argument("--rival", type=pathlib.Path, help="checkout of the public generative-recommenders repository")
    parser.add_argument("--rival-revision", default="unknown", help="its commit, for the record")
    parser.add_argument("--output", type=pathlib.Path, help="where the JSON goes")
    options = parser.parse_args(arguments)

    console = Console(width=170)
    matmul = matmul_tflops()
    workloads = [WORKLOADS[name] for name in options.workloads.split(",") if name]
    workloads += [of_length(int(length)) for length in options.lengths.split(",") if length]
    result: dict[str, Any] = {"provenance": provenance(), "matmul_tflops": matmul, "records": []}

    def add(records: list[dict[str, Any]]) -> None:
        result["records"] += records
        for record in records:
            if "reason" in record:
                console.print(f"{record['workload']}, {record['implementation']}: {record['reason']}")
        console.print(table([record for record in records if "ms" in record]))
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    for w in workloads:
        add(measure(w, options.implementations.split(","), matmul))
    if options.rival is not None:
        versions, records = rivals(options.rival, workloads, matmul)
        result["rivals"] = versions | {"revision": options.rival_revision}
        add(records)
    console.print(f"bfloat16 matmul: {matmul:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
