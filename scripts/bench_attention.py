"""Speed and error of attention implementations on the workloads: a table on the terminal, and JSON.

    python -m scripts.bench_attention --implementations mosaic,xla --output experiments/results/attention_h200.json

Times are device time with inputs on the device; lists of work and tile bounds are made beforehand and their cost is a
column of its own. FLOPs are useful ones: unmasked pairs, the backward 2.5 times the forward.
"""

import argparse
import datetime
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

from kernels import device
from kernels.hstu_attention import hstu_attention, make_plan, mosaic_hopper
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.timing import device_time

COLUMNS = ("workload", "implementation", "pass", "ms", "tflops", "of_matmul", "gb_s", "temp_mib", "plan_us", "error")


def matmul_tflops(size: int = 8192) -> float:
    """What a plain bfloat16 product of random matrices reaches in this run: the yardstick of `of_matmul`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return device_time(jax.jit(jnp.matmul), a, b).tflops(2.0 * size**3)


def silu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate = 1 / (1 + np.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


def sampled_error(w: Workload, arrays: dict[str, jax.Array], got: dict[str, jax.Array], samples: int = 8) -> float:
    """Largest relative error of some rows of the output (or keys, for gradients) against float64 on the host."""
    q, k, v, g = (arrays[name] for name in "qkvg")
    alpha, scale, offsets = w.k_width**-0.5, 1 / w.max_length, w.offsets()
    lo0, hi0, lo1, hi1 = (np.asarray(x) for x in w.mask.intervals(offsets, w.rows))
    place, worst = np.arange(w.rows), 0.0
    for sample, at in enumerate(np.linspace(0, offsets[-1] - 1, samples).astype(int)):
        head = sample % w.heads
        seen = ((place >= lo0[at]) & (place < hi0[at])) | ((place >= lo1[at]) & (place < hi1[at])) | (place == at)
        seers = ((lo0 <= at) & (at < hi0)) | ((lo1 <= at) & (at < hi1)) | (place == at)
        row = {n: np.asarray(x[at, head], np.float64) for n, x in zip("qkvg", (q, k, v, g), strict=True)}

        def rows_of(x: jax.Array, chosen: np.ndarray, head: int = head) -> np.ndarray:
            return np.asarray(x[np.flatnonzero(chosen), head], np.float64)

        keys, values, queries, outs = rows_of(k, seen), rows_of(v, seen), rows_of(q, seers), rows_of(g, seers)
        weight, slope = silu_and_slope(alpha * keys @ row["q"])
        back, back_slope = silu_and_slope(alpha * queries @ row["k"])
        want = {
            "out": scale * weight @ values,
            "dq": alpha * scale * (slope * (values @ row["g"])) @ keys,
            "dk": alpha * scale * (back_slope * (outs @ row["v"])) @ queries,
            "dv": scale * back @ outs,
        }
        for name, x in got.items():
            distance = np.linalg.norm(np.asarray(x[at, head], np.float64) - want[name])
            worst = max(worst, float(distance / np.linalg.norm(want[name])))
    return worst


def measure(w: Workload, implementation: str, matmul: float) -> list[dict[str, Any]]:
    """A record for each pass; NotImplementedError where the implementation cannot."""
    arrays, options, offsets = w.arrays(), w.options(), jnp.asarray(w.offsets())
    tensors = [arrays[name] for name in "qkvg"]

    def planned(offsets: jax.Array) -> Any:
        plan = make_plan(w.mask, offsets, w.rows)
        return mosaic_hopper.prepare(plan, w.heads, w.k_width, w.v_width) if implementation == "mosaic" else plan

    plan = jax.jit(planned)(offsets)
    plan_us = 1e6 * device_time(jax.jit(planned), offsets).seconds

    def attend(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return hstu_attention(q, k, v, offsets, plan=plan, implementation=implementation, **options)

    def forward(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        return {"out": attend(plan, q, k, v)}

    def backward(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        _, pull = jax.vjp(functools.partial(attend, plan), q, k, v)  # the forward's output is not used, so XLA drops it
        return dict(zip(("dq", "dk", "dv"), pull(g), strict=True))

    records = []
    passes: tuple[tuple[str, Callable[..., Any], float], ...] = (
        ("forward", forward, w.forward_flops),
        ("backward", backward, w.backward_flops),
    )
    for name, run, flops in passes:
        compiled = jax.jit(run).lower(plan, *tensors).compile()
        timing = device_time(compiled, plan, *tensors)
        moved = w.forward_bytes if name == "forward" else 2 * w.forward_bytes
        memory = compiled.memory_analysis()
        records.append(
            {
                "workload": w.name,
                "implementation": implementation,
                "pass": name,
                "ms": timing.seconds * 1e3,
                "samples_ms": [x * 1e3 for x in timing.samples],
                "tflops": timing.tflops(flops),
                "of_matmul": timing.utilization(flops, matmul),
                "gb_s": timing.gigabytes(float(moved)),
                "temp_mib": memory.temp_size_in_bytes / 2**20 if memory is not None else None,
                "plan_us": plan_us,
                "error": None if w.bias else sampled_error(w, arrays, compiled(plan, *tensors)),
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> Table:
    out = Table(*COLUMNS)
    for record in records:
        cells = (record.get(name) for name in COLUMNS)
        out.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells))
    return out


def git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="mosaic", help="names, with commas between")
    parser.add_argument("--workloads", default=",".join(n for n, w in WORKLOADS.items() if not w.bias))
    parser.add_argument("--output", type=pathlib.Path, help="where the JSON goes")
    options = parser.parse_args(arguments)

    console, records = Console(width=160), []
    matmul = matmul_tflops()
    for name in options.workloads.split(","):
        for implementation in options.implementations.split(","):
            try:
                records += measure(WORKLOADS[name], implementation, matmul)
            except NotImplementedError as error:
                console.print(f"{name}: {error}")
    console.print(table(records))
    console.print(f"bfloat16 matmul: {matmul:.0f} TFLOP/s")
    if options.output is not None:
        result = {
            "device": device.current().kind,
            "jax": jax.__version__,
            "commit": git_commit(),
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m scripts.bench_attention", *(sys.argv[1:] if arguments is None else arguments)]),
            "matmul_tflops": matmul,
            "records": records,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
