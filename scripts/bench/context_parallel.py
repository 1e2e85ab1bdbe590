"""Context parallelism, measured: the longest sequences, training steps by strategy, the first exchange of a batch, one very long history, balance.

    python -m scripts.bench.context_parallel --stages=steps,long,confirm,reshard     # on one host with two Hopper GPUs or more
    python -m scripts.bench.context_parallel --stages=balance,longest --jobs=2       # needs no GPU; `longest` needs the CUDA plugin of JAX
    python -m scripts.bench.context_parallel --small --stages=steps,long,reshard     # a few seconds, on CPU devices

A step is loss, backward and optimizer of a model of width 512, 8 layers, 4 heads of 128, bfloat16, on a batch that is the same for all cases of a
comparison. Programs are compiled side by side, each in a process of its own, and then run one after another with nothing beside them; a time is the
median of its samples. Bytes on the wire are read from the compiled programs. Every measurement is recorded when it is made, beside what a record holds.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from experiments import command
from kernels.timing import device_time
from scripts.bench import context_parallel_longest
from scripts.bench.context_parallel_balance import balance, draw_lengths
from scripts.bench.context_parallel_model import Case, Program
from scripts.bench.turns import one_by_one
from ultra_hstu import provenance, report, workdir
from ultra_hstu.parallel.collectives import bytes_sent
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.reshard import gather_then_slice, needed_capacity, to_shared

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


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
            cases[strategy] = Case(
                mask, users, length, context=devices, strategy=strategy, small=small
            )
        if users % devices == 0:
            cases["data"] = Case(mask, users, length, data=devices, small=small)
        twice = strategies[0]
        cases[f"{twice}, {devices} x batch"] = Case(
            mask, devices * users, length, context=devices, strategy=twice, small=small
        )
        groups[mask] = cases
    return groups


def prepare_step(
    case: Case, rounds: int, seconds: float, trace: str | None = None
) -> Callable[[], dict[str, Any]]:
    """Compiles a case's step. What it returns times it, and leaves a profile of two steps in the folder `trace`."""
    program = Program(case, jax.devices()).compile()
    state, batch = program.start()

    def run(calls: int) -> float:
        """Seconds of a step, of `calls` enqueued together; the last one's loss is waited for, too."""
        nonlocal state
        jax.block_until_ready(state)
        started = time.perf_counter()
        for _ in range(calls):
            state, _ = program.run(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / calls

    def measure() -> dict[str, Any]:
        nonlocal state
        state, metrics = program.run(state, batch)
        run(1)
        calls = max(1, round(seconds / run(1)))
        samples = [run(calls) for _ in range(rounds)]
        if trace:
            with jax.profiler.trace(trace):
                run(2)
        step = statistics.median(samples)
        return {
            "data": case.data,
            "context": case.context,
            "users": case.users,
            "length": case.length,
            "step_ms": 1e3 * step,
            "samples_ms": [1e3 * s for s in samples],
            "tokens_a_second": case.users * case.length / step,
            "bytes_sent_a_step": program.bytes_sent(),
            "bytes_a_device": program.bytes(),
            "first_loss": float(metrics["loss"]),
        }

    return measure


def with_speed_up(found: dict[str, Any]) -> dict[str, Any]:
    """Cases of one comparison, beside the step on one device; one that failed has its error."""
    found = {
        name: {"error": str(values)} if isinstance(values, Exception) else values
        for name, values in found.items()
    }
    base = found.get("one device", {}).get("tokens_a_second")
    return {
        name: values
        | (
            {"speed_up": values["tokens_a_second"] / base}
            if base and "tokens_a_second" in values
            else {}
        )
        for name, values in found.items()
    }


# --- the first exchange of a batch ---


def measure_reshard(devices: int, rows: int, width: int, seconds: float) -> dict[str, Any]:
    """Jagged batches that every device read for itself into one shared buffer: the all-to-all, and the all-gather that the paper starts from."""
    mesh, rng, result = (
        make_mesh(context=devices, devices=jax.devices()[:devices]),
        np.random.default_rng(0),
        {},
    )
    local = rows // devices
    lengths_Bd = [
        draw_lengths(rng, "lognormal", local - local // 16 * int(rng.integers(0, 4)), local // 8)
        for _ in range(devices)
    ]
    most = max(map(len, lengths_Bd))
    lengths = np.concatenate([np.pad(x, (0, most - len(x))) for x in lengths_Bd]).astype(np.int32)
    spread = NamedSharding(mesh, PartitionSpec("context"))
    values = [
        jax.device_put(
            rng.standard_normal((rows, width), dtype=np.float32).astype(jnp.bfloat16), spread
        ),
        jax.device_put(rng.integers(0, 99, (rows, 4)).astype(np.int32), spread),
    ]
    for place, layout in (
        ("slices", Layout.contiguous(rows, devices)),
        ("blocks", Layout.striped(rows, devices, min(128, local // 2))),
    ):
        capacity = needed_capacity(lengths, layout)
        ways: dict[str, Callable[..., Any]] = {
            "all_to_all": lambda x, n, layout=layout, capacity=capacity: (
                to_shared(x, n, layout, capacity).values
            ),
            "all_gather": lambda x, n, layout=layout: gather_then_slice(x, n, layout).values,
        }
        found: dict[str, Any] = {}
        for name, move in ways.items():
            rows_spec = PartitionSpec("context")
            run = jax.jit(
                jax.shard_map(
                    move, mesh=mesh, in_specs=rows_spec, out_specs=rows_spec, check_vma=False
                )
            )
            program = run.lower(values, jax.device_put(lengths, spread)).compile()
            memory = program.memory_analysis()
            timing = device_time(
                program,
                values,
                jax.device_put(lengths, spread),
                repetitions=5,
                sample_seconds=seconds,
            )
            found[name] = {
                "ms": 1e3 * timing.seconds,
                "batches_a_second": 1 / timing.seconds,
                "temporary_bytes": memory.temp_size_in_bytes if memory else None,
                "bytes_sent": bytes_sent(program.as_text() or "", devices),
            }
        result[place] = found
    return {"rows": rows, "width": width, "devices": devices, "ways": result}


# --- the program ---


class Record:
    """A JSON file that grows stage by stage; what an earlier command found stays."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"context_parallel_{name}.json"
        self.value: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, **parts: Any) -> None:
        self.value |= provenance.provenance() | {"xla_flags": os.environ.get("XLA_FLAGS")} | parts
        workdir.write_json(self.path, self.value)


class Measurement(NamedTuple):
    """What a stage measures: `prepare(*arguments)()`, and what becomes of it."""

    prepare: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...]
    keep: Callable[[Any], None]


def main(_: list[str]) -> None:
    if unknown := set(FLAGS.stages) - set(STAGES):
        raise ValueError(
            f"--stages={','.join(FLAGS.stages)}: {sorted(unknown)} are none of {', '.join(STAGES)}"
        )
    # Every measurement has a process of its own; those that wait for their turn hold some memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    folder, console = Path(FLAGS.folder), report.make_console()
    measurements = [one for stage in FLAGS.stages for one in STAGES[stage](folder, console) or ()]
    started = time.perf_counter()
    results = one_by_one(
        [(one.prepare, one.arguments) for one in measurements], processes=not FLAGS.small
    )
    for one, result in zip(measurements, results, strict=True):
        one.keep(result)
        console.print(f"{time.perf_counter() - started:.0f} s")


def stage_balance(folder: Path, console: Any) -> None:
    found = balance(4096 if FLAGS.small else 65536)
    Record(folder, "balance").add(**found)
    table = Table("lengths / mask", "contiguous", "striped", "balanced")
    for name, values in found["busiest_over_mean"].items():
        table.add_row(
            name,
            *(
                f"{values[layout]:.3f}" if layout in values else ""
                for layout in ("contiguous", "striped", "balanced")
            ),
        )
    console.print(table)


def stage_longest(folder: Path, console: Any) -> None:
    record = Record(folder, "longest")
    budget = FLAGS.budget_gib * context_parallel_longest.GIB
    known: dict[str, dict[str, Any]] = record.value.get("variants", {})
    users = 2 if FLAGS.small else context_parallel_longest.USERS
    contexts = [int(context) for context in FLAGS.contexts]
    compiled_for = (
        "CPU devices" if FLAGS.small else "NVIDIA H100 80GB HBM3 (described, not present)"
    )
    conditions = dict(budget_GiB=FLAGS.budget_gib, users=users, compiled_for=compiled_for)
    same = all(
        record.value.get(key) == value
        for key, value in (conditions | {"commit": provenance.provenance()["commit"]}).items()
    )
    variants = dict(known) if same else {}
    wanted = [
        variant
        for variant in context_parallel_longest.VARIANTS
        if not FLAGS.remat or variant[1] == FLAGS.remat
    ]
    for variant, context, found in context_parallel_longest.search(
        budget, contexts, users, wanted, FLAGS.small, FLAGS.jobs, known
    ):
        variants.setdefault(variant, {})[str(context)] = found
        console.print(f"{variant}, context {context}: {found}")
        record.add(**conditions, variants=variants)


def stage_steps(folder: Path, console: Any) -> Iterator[Measurement]:
    record = Record(folder, f"steps_{_device_name()}")
    users, length = (4, 128) if FLAGS.small else (FLAGS.users, FLAGS.length)
    rounds, seconds = (2, 0.01) if FLAGS.small else (7, 0.3)
    groups = step_cases(_devices(), users, length, FLAGS.small)
    found: dict[str, dict[str, Any]] = {mask: {} for mask in groups}

    def keep(mask: str, name: str, result: Any) -> None:
        found[mask] = with_speed_up(found[mask] | {name: result})
        record.add(devices=_devices(), steps=found)
        console.print(
            mask,
            name,
            {key: value for key, value in found[mask][name].items() if key != "samples_ms"},
        )

    for mask, cases in groups.items():
        for name, case in cases.items():
            trace = str(Path(FLAGS.trace) / f"{mask}, {name}") if FLAGS.trace else None
            yield Measurement(
                prepare_step, (case, rounds, seconds, trace), functools.partial(keep, mask, name)
            )


def stage_long(folder: Path, console: Any) -> Iterator[Measurement]:
    """One user's history of 131,072 events, on all devices."""
    length, small = (256, True) if FLAGS.small else (131072, False)
    case = Case("semi_local", 1, length, context=_devices(), strategy="halo", small=small)

    def keep(found: Any) -> None:
        console.print(found)
        if isinstance(found, Exception):
            raise found
        Record(folder, f"steps_{_device_name()}").add(long=found)

    yield Measurement(context_parallel_longest.prepare_training, (case, 8), keep)


def stage_confirm(folder: Path, console: Any) -> Iterator[Measurement]:
    """Trains at the longest lengths, on one device and on two."""
    record, devices = Record(folder, "longest"), jax.devices()
    if "variants" not in record.value:
        raise ValueError(f"{record.path} holds no lengths to confirm: run --stages=longest first")
    room = 0.97 * (devices[0].memory_stats() or {}).get("bytes_limit", 2**33)
    confirmed: list[dict[str, Any]] = []

    def keep(bytes_found: int, found: Any) -> None:
        console.print(found)
        confirmed.append(
            {"bytes_found": bytes_found}
            | ({"error": str(found)} if isinstance(found, Exception) else found)
        )
        workdir.write_json(
            record.path,
            record.value | {"confirmed": {**provenance.provenance(), "runs": confirmed}},
        )

    for context in (1, 2):
        if context > len(devices):
            continue
        for case, bytes_found in context_parallel_longest.lengths_to_confirm(
            record.value, context, room
        ):
            arguments = (
                case,
                3,
                context_parallel_longest.UNTUNED,
            )  # the very program whose memory was predicted
            yield Measurement(
                context_parallel_longest.prepare_training,
                arguments,
                functools.partial(keep, bytes_found),
            )


def stage_reshard(folder: Path, console: Any) -> Iterator[Measurement]:
    rows, width = (4096, 16) if FLAGS.small else (131072 * _devices(), 512)

    def keep(found: Any) -> None:
        console.print(found)
        if isinstance(found, Exception):
            raise found
        Record(folder, f"steps_{_device_name()}").add(reshard=found)

    yield Measurement(
        functools.partial,
        (measure_reshard, _devices(), rows, width, 0.01 if FLAGS.small else 0.1),
        keep,
    )


def _devices() -> int:
    return jax.device_count() if FLAGS.devices is None else FLAGS.devices


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
    flags.DEFINE_enum(
        "remat", None, ["none", "selective"], "of the model in the stage `longest`; both by default"
    )
    flags.DEFINE_list("contexts", ["1", "2", "4", "8"], "context shards of the stage `longest`")
    flags.DEFINE_float("budget_gib", 80.0, "memory of a device in the stage `longest`")
    flags.DEFINE_integer("jobs", 1, "processes that compile in the stage `longest`")
    flags.DEFINE_string("trace", None, "a folder for profiles of the stage `steps`")
    flags.DEFINE_string("folder", str(RESULTS), "where the records go")
    command.run(main)
