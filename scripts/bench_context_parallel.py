"""Context parallelism, measured: the longest sequences, training steps by strategy, the first exchange of a batch, one very long history, balance.

    python -m scripts.bench_context_parallel --stages=steps,long,confirm,reshard     # on one host with two Hopper GPUs or more
    python -m scripts.bench_context_parallel --stages=balance,longest --jobs=2       # needs no GPU; `longest` needs the CUDA plugin of JAX
    python -m scripts.bench_context_parallel --small --stages=steps,long,reshard     # a few seconds, on CPU devices

A step is loss, backward and optimizer of a model of width 512, 8 layers, 4 heads of 128, bfloat16, on a batch that is the same for all cases of a
comparison. Programs are compiled side by side and then take turns on the devices; a time is the median over the turns. Bytes on the wire are read from
the compiled programs. Every stage writes its record when it is done, and goes on from what a record holds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from experiments import command
from kernels.mask import AttentionMask
from kernels.timing import device_time
from scripts import context_parallel_longest
from scripts.context_parallel_model import SEMI_LOCAL, Case, Program
from ultra_hstu import provenance, report, workdir
from ultra_hstu.parallel.collectives import bytes_sent
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.reshard import gather_then_slice, needed_capacity, to_shared

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parent.parent / "experiments" / "results"
SHARE = 0.94  # of a GPU's memory, where all of it is wanted


# --- training steps ---


def step_cases(devices: int, users: int, length: int, small: bool) -> dict[str, dict[str, Case]]:
    """For each mask, the cases that are compared: the same batch on one device and on all, by strategy, and twice the batch."""
    groups: dict[str, dict[str, Case]] = {}
    for mask, strategies in (("semi_local", ("halo",)), ("causal", ("ring", "gather", "ulysses"))):
        one = Case(mask, users, length, small=small)
        cases = {"one device": one}
        for strategy in strategies:
            if strategy == "ulysses" and one.config.model.heads % devices:
                continue
            cases[strategy] = Case(mask, users, length, context=devices, strategy=strategy, small=small)
        if users % devices == 0:
            cases["data"] = Case(mask, users, length, data=devices, small=small)
        twice = strategies[0]
        cases[f"{twice}, {devices} x batch"] = Case(mask, devices * users, length, context=devices, strategy=twice, small=small)
        groups[mask] = cases
    return groups


def compiled_together(groups: dict[str, dict[str, Case]]) -> dict[tuple[str, str], Program | str]:
    """The program of every case of every group, or the error of compiling it, which is part of the result: the others may still run."""

    def compiled(case: Case) -> Program | str:
        try:
            return Program(case, jax.devices()).compile()
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:2000]

    cases = {(group, name): case for group, named in groups.items() for name, case in named.items()}
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(compiled, cases.values()), strict=True))


def measure_steps(found: dict[str, Program | str], rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Every case's step, timed in turns."""
    results: dict[str, dict[str, Any]] = {name: {"error": error} for name, error in found.items() if isinstance(error, str)}
    programs = {name: program for name, program in found.items() if isinstance(program, Program)}
    states: dict[str, Any] = {}
    batches: dict[str, Any] = {}
    calls: dict[str, int] = {}
    losses: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for name, program in programs.items():
        states[name], batches[name] = program.start()
        states[name], metrics = program.run(states[name], batches[name])
        losses[name] = float(metrics["loss"])
        once = _time(program, states, batches, name, 1)
        calls[name] = max(1, round(seconds / once))
    for _ in range(rounds):
        for name in states:
            samples[name].append(_time(programs[name], states, batches, name, calls[name]))
    for name in states:
        case, step = programs[name].case, statistics.median(samples[name])
        results[name] = {
            "data": case.data,
            "context": case.context,
            "users": case.users,
            "length": case.length,
            "step_ms": 1e3 * step,
            "samples_ms": [1e3 * s for s in samples[name]],
            "tokens_a_second": case.users * case.length / step,
            "bytes_sent_a_step": programs[name].bytes_sent(),
            "bytes_a_device": programs[name].bytes(),
            "first_loss": losses[name],
        }
    if base := results.get("one device", {}).get("tokens_a_second"):
        for values in results.values():
            if "tokens_a_second" in values:
                values["speed_up"] = values["tokens_a_second"] / base
    return {name: results[name] for name in found}


def _time(program: Program, states: dict[str, Any], batches: dict[str, Any], name: str, calls: int) -> float:
    """Seconds of a step, of `calls` enqueued together."""
    jax.block_until_ready(states[name])
    started = time.perf_counter()
    for _ in range(calls):
        states[name], _ = program.run(states[name], batches[name])
    jax.block_until_ready(states[name])
    return (time.perf_counter() - started) / calls


# --- the first exchange of a batch ---


def measure_reshard(devices: int, rows: int, width: int, seconds: float) -> dict[str, Any]:
    """Jagged batches that every device read for itself into one shared buffer: the all-to-all, and the all-gather that the paper starts from."""
    mesh, rng, result = make_mesh(context=devices, devices=jax.devices()[:devices]), np.random.default_rng(0), {}
    local = rows // devices
    lengths_Bd = [_lengths(rng, "lognormal", local - local // 16 * int(rng.integers(0, 4)), local // 8) for _ in range(devices)]
    most = max(map(len, lengths_Bd))
    lengths = np.concatenate([np.pad(x, (0, most - len(x))) for x in lengths_Bd]).astype(np.int32)
    spread = NamedSharding(mesh, PartitionSpec("context"))
    values = [
        jax.device_put(rng.standard_normal((rows, width), dtype=np.float32).astype(jnp.bfloat16), spread),
        jax.device_put(rng.integers(0, 99, (rows, 4)).astype(np.int32), spread),
    ]
    for place, layout in (("slices", Layout.contiguous(rows, devices)), ("blocks", Layout.striped(rows, devices, min(128, local // 2)))):
        capacity = needed_capacity(lengths, layout)
        ways: dict[str, Callable[..., Any]] = {
            "all_to_all": lambda x, n, layout=layout, capacity=capacity: to_shared(x, n, layout, capacity).values,
            "all_gather": lambda x, n, layout=layout: gather_then_slice(x, n, layout).values,
        }
        found: dict[str, Any] = {}
        for name, move in ways.items():
            rows_spec = PartitionSpec("context")
            run = jax.jit(jax.shard_map(move, mesh=mesh, in_specs=rows_spec, out_specs=rows_spec, check_vma=False))
            program = run.lower(values, jax.device_put(lengths, spread)).compile()
            memory = program.memory_analysis()
            timing = device_time(program, values, jax.device_put(lengths, spread), repetitions=5, sample_seconds=seconds)
            found[name] = {
                "ms": 1e3 * timing.seconds,
                "batches_a_second": 1 / timing.seconds,
                "temporary_bytes": memory.temp_size_in_bytes if memory else None,
                "bytes_sent": bytes_sent(program.as_text() or "", devices),
            }
        result[place] = found
    return {"rows": rows, "width": width, "devices": devices, "ways": result}


# --- balance ---


def _lengths(rng: np.random.Generator, kind: str, rows: int, longest: int) -> list[int]:
    """Lengths of sequences that fill a buffer."""
    draw: dict[str, Callable[[], float]] = {
        "zipf": lambda: 200 * rng.zipf(1.3),
        "lognormal": lambda: rng.lognormal(np.log(longest / 32), 1.5),
        "one long, many short": lambda: longest if not lengths else 64,
        "equal": lambda: longest / 8,
    }
    lengths: list[int] = []
    while (left := rows - sum(lengths)) > 0:
        lengths.append(max(1, min(int(min(draw[kind](), longest)), left)))
    return lengths


def balance(rows: int = 65536, shards: int = 8) -> dict[str, Any]:
    """Attention FLOPs of the busiest shard over the mean, the worst of several draws, by lengths and layout; FLOPs go with (row, key) pairs.

    `ring` and `gather` compute a pair where its row is, `halo` where its key is, for the rows that visit other shards; it lies in slices.
    """
    causal, semi_local = AttentionMask(), AttentionMask(window=SEMI_LOCAL, full_rows=SEMI_LOCAL)
    found: dict[str, dict[str, float]] = {}
    for kind in ("equal", "lognormal", "zipf", "one long, many short"):
        for seed in range(5):
            lengths = _lengths(np.random.default_rng(seed), kind, rows, rows // 2)
            seen = semi_local.row_intervals(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), rows)
            by_key_T = sum(np.asarray(hi) - np.asarray(lo) for lo, hi in zip(seen[::2], seen[1::2], strict=True)) + 1
            by_row_T = causal.row_pairs(lengths, rows)
            loads = {
                "causal": {
                    "contiguous": _busiest(by_row_T, Layout.contiguous(rows, shards)),
                    "striped": _busiest(by_row_T, Layout.striped(rows, shards)),
                    "balanced": _busiest(by_row_T, Layout.balanced(lengths, causal, rows, shards)),
                },
                "semi_local": {"contiguous": _busiest(by_key_T, Layout.contiguous(rows, shards))},
            }
            for mask, layouts in loads.items():
                worst = found.setdefault(f"{kind}/{mask}", {})
                worst.update({name: max(worst.get(name, 0.0), load) for name, load in layouts.items()})
    return {"rows": rows, "shards": shards, "block": 128, "draws": 5, "busiest_over_mean": found}


def _busiest(pairs_T: np.ndarray, layout: Layout) -> float:
    pairs_C = pairs_T[np.asarray(layout.permutation())].reshape(layout.shards, -1).sum(1)
    return float(pairs_C.max() / pairs_C.mean())


# --- the program ---


class Record:
    """A JSON file that grows stage by stage; what an earlier command found stays."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"context_parallel_{name}.json"
        self.value: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, **parts: Any) -> None:
        self.value |= provenance.provenance() | {"xla_flags": os.environ.get("XLA_FLAGS")} | parts
        workdir.write_json(self.path, self.value)


def main(_: list[str]) -> None:
    if unknown := set(FLAGS.stages) - set(STAGES):
        raise ValueError(f"--stages={','.join(FLAGS.stages)}: {sorted(unknown)} are none of {', '.join(STAGES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # stages have processes of their own
    folder, console = Path(FLAGS.folder), report.make_console()
    for stage in FLAGS.stages:
        started = time.perf_counter()
        STAGES[stage](folder, console)
        console.print(f"{stage}: {time.perf_counter() - started:.0f} s")


def stage_balance(folder: Path, console: Any) -> None:
    found = balance(4096 if FLAGS.small else 65536)
    Record(folder, "balance").add(**found)
    table = Table("lengths / mask", "contiguous", "striped", "balanced")
    for name, values in found["busiest_over_mean"].items():
        table.add_row(name, *(f"{values[layout]:.3f}" if layout in values else "" for layout in ("contiguous", "striped", "balanced")))
    console.print(table)


def stage_longest(folder: Path, console: Any) -> None:
    record = Record(folder, "longest")
    budget = FLAGS.budget_gib * context_parallel_longest.GIB
    variants: dict[str, dict[str, Any]] = {}
    users = 2 if FLAGS.small else context_parallel_longest.USERS
    contexts = [int(context) for context in FLAGS.contexts]
    for variant, context, found in context_parallel_longest.search(budget, contexts, users, FLAGS.small, FLAGS.jobs):
        variants.setdefault(variant, {})[str(context)] = found
        console.print(f"{variant}, context {context}: {found}")
        compiled_for = "CPU devices" if FLAGS.small else "NVIDIA H100 80GB HBM3 (described, not present)"
        record.add(budget_GiB=FLAGS.budget_gib, users=users, compiled_for=compiled_for, variants=variants)


def stage_steps(folder: Path, console: Any) -> None:
    record = Record(folder, f"steps_{_device_name()}")
    devices, found = jax.device_count() if FLAGS.devices is None else FLAGS.devices, {}
    users, length = (4, 128) if FLAGS.small else (FLAGS.users, FLAGS.length)
    groups = step_cases(devices, users, length, FLAGS.small)
    programs = compiled_together(groups)
    for mask, cases in groups.items():
        found[mask] = measure_steps(
            {name: programs.pop((mask, name)) for name in cases}, rounds=2 if FLAGS.small else 7, seconds=0.01 if FLAGS.small else 0.3
        )
        record.add(devices=devices, steps=found)
        table = Table(mask, "ms", "tokens/s", "speed-up", "MB sent", "GiB", "loss")
        for name, values in found[mask].items():
            if isinstance(values, dict):
                keys = {
                    "step_ms": 1,
                    "tokens_a_second": 1,
                    "speed_up": 1,
                    "bytes_sent_a_step": 1e6,
                    "bytes_a_device": 2**30,
                    "first_loss": 1,
                }
                table.add_row(name, *(f"{values[key] / unit:.5g}" if key in values else values["error"][:99] for key, unit in keys.items()))
        console.print(table)


def stage_long(folder: Path, console: Any) -> None:
    """One user's history of 131,072 events, on all devices."""
    devices = jax.device_count() if FLAGS.devices is None else FLAGS.devices
    length, small = (256, True) if FLAGS.small else (131072, False)
    case = Case("semi_local", 1, length, context=devices, strategy="halo", small=small)
    found = _alone(context_parallel_longest.train_at, case, 8, SHARE)
    Record(folder, f"steps_{_device_name()}").add(long=found)
    console.print(found)


def stage_confirm(folder: Path, console: Any) -> None:
    """Trains at the longest lengths, on one device and on two."""
    record, devices = Record(folder, "longest"), jax.devices()
    if "variants" not in record.value:
        raise ValueError(f"{record.path} holds no lengths to confirm: run --stages=longest first")
    room = SHARE * 0.97 * ((devices[0].memory_stats() or {}).get("bytes_limit", 2**33) / 0.75)  # the limit is a share of the memory
    confirmed: list[dict[str, Any]] = []
    for context in (1, 2):
        if context > len(devices):
            continue
        for case, found in context_parallel_longest.lengths_to_confirm(record.value, context, room):
            confirmed.append({"bytes_found": found, **_alone(context_parallel_longest.train_at, case, 3, SHARE)})
            console.print(confirmed[-1])
            workdir.write_json(record.path, record.value | {"confirmed": {**provenance.provenance(), "runs": confirmed}})


def stage_reshard(folder: Path, console: Any) -> None:
    devices = jax.device_count() if FLAGS.devices is None else FLAGS.devices
    rows, width = (4096, 16) if FLAGS.small else (131072 * devices, 512)
    found = measure_reshard(devices, rows, width, seconds=0.01 if FLAGS.small else 0.1)
    Record(folder, f"steps_{_device_name()}").add(reshard=found)
    console.print(found)


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own on GPUs, whose memory it measures."""
    return function(*args) if FLAGS.small else context_parallel_longest.in_a_process(function, *args)


def _device_name() -> str:
    kind = jax.devices()[0].device_kind.lower()
    return next((name for name in ("h100", "h200", "cpu") if name in kind), kind.replace(" ", "_"))


STAGES = {
    "balance": stage_balance,
    "longest": stage_longest,
    "steps": stage_steps,
    "long": stage_long,
    "confirm": stage_confirm,
    "reshard": stage_reshard,
}

if __name__ == "__main__":
    flags.DEFINE_list("stages", ["steps", "long", "confirm", "reshard"], f"of {', '.join(STAGES)}")
    flags.DEFINE_bool("small", False, "a model and lengths that a CPU can do")
    flags.DEFINE_integer("devices", None, "how many to use; all by default")
    flags.DEFINE_integer("users", 8, "histories in the batch of the stage `steps`")
    flags.DEFINE_integer("length", 32768, "events of each of them")
    flags.DEFINE_list("contexts", ["1", "2", "4", "8"], "context shards of the stage `longest`")
    flags.DEFINE_float("budget_gib", 80.0, "memory of a device in the stage `longest`")
    flags.DEFINE_integer("jobs", 1, "processes that compile in the stage `longest`")
    flags.DEFINE_string("folder", str(RESULTS), "where the records go")
    command.run(main)
