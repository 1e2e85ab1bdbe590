"""Context parallelism, measured: longest sequences, steps by strategy, exchange, balance.

    # on one host with two Hopper GPUs or more
    python -m scripts.bench.context_parallel --stages=steps,long,confirm,reshard
    # needs no GPU; `longest` needs the CUDA plugin of JAX
    python -m scripts.bench.context_parallel --stages=balance,longest --jobs=2
    # a few seconds, on CPU devices
    python -m scripts.bench.context_parallel --small --stages=steps,long,reshard

A step is loss, backward and optimizer of a model of width 512, 8 layers, 4 heads of 128, bfloat16,
on a batch that is the same for all cases of a comparison. Programs are compiled side by side, each
in a process of its own, and then run one after another with nothing beside them; a time is the
median of its samples. Bytes on the wire are read from the compiled programs. Every measurement is
recorded when it is made, beside what a record holds.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from absl import flags

from experiments import command
from experiments.record import Json, Record, read
from scripts.bench import context_parallel_longest as longest
from scripts.bench.context_parallel_balance import balance
from scripts.bench.context_parallel_case import Case
from scripts.bench.context_parallel_reshard import measure_reshard
from scripts.bench.terminal import show
from scripts.bench.turns import one_by_one
from ultra_hstu import json_files, provenance, report
from ultra_hstu.parallel.collectives import bytes_sent

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
STRATEGIES: dict[str, tuple[Literal["halo", "ring", "gather", "ulysses"], ...]] = {
    "semi_local": ("halo",),
    "causal": ("ring", "gather", "ulysses"),
}


def step_cases(devices: int, users: int, length: int, small: bool) -> dict[str, dict[str, Case]]:
    """For each mask, the cases that are compared.

    The same batch on one device and on all, by strategy; and more users for all devices.
    """
    groups: dict[str, dict[str, Case]] = {}
    for mask, strategies in STRATEGIES.items():
        one = Case(mask, users, length, small=small)
        cases = {"one device": one}
        shared = dataclasses.replace(one, context=devices)
        for strategy in strategies:
            if strategy != "ulysses" or one.config.model.heads % devices == 0:
                cases[strategy] = dataclasses.replace(shared, strategy=strategy)
        if users % devices == 0:
            cases["data"] = dataclasses.replace(one, data=devices)
        first = strategies[0]
        cases[f"{first}, {devices} x batch"] = dataclasses.replace(
            cases[first], users=devices * users
        )
        groups[mask] = cases
    return groups


def prepare_step(
    case: Case, rounds: int, seconds: float, trace: str | None = None
) -> Callable[[], Json]:
    """Compiles a case's step; what it returns times it.

    Args:
      trace: a folder for a profile of two steps.
    """
    program = case.compiled(jax.devices())

    def measure() -> Json:
        samples, loss = program.sample(rounds, seconds)
        if trace:
            program.profile(steps=2, folder=Path(trace))
        step = statistics.median(samples)
        return {
            "data": case.data,
            "context": case.context,
            "users": case.users,
            "length": case.length,
            "step_ms": 1e3 * step,
            "samples_ms": [1e3 * sample for sample in samples],
            "tokens_a_second": case.users * case.length / step,
            "bytes_sent_a_step": bytes_sent(program.text, case.devices),
            "bytes_a_device": program.bytes(),
            "first_loss": loss,
        }

    return measure


def with_speed_up(found: Json) -> Json:
    """Cases of one comparison, beside the step on one device; one that failed has its error."""
    found = {
        name: {"error": str(values)} if isinstance(values, Exception) else values
        for name, values in found.items()
    }
    base = found.get("one device", {}).get("tokens_a_second")
    for values in found.values():
        if base and "tokens_a_second" in values:
            values["speed_up"] = values["tokens_a_second"] / base
    return found


class Measurement(NamedTuple):
    """What a stage measures: `prepare()()`, and what becomes of it."""

    prepare: Callable[[], Callable[[], Json]]
    keep: Callable[[Json | Exception], None]


def main(_: list[str]) -> None:
    if unknown := sorted(set(FLAGS.stages) - set(STAGES)):
        given = ",".join(FLAGS.stages)
        raise ValueError(f"--stages={given}: {unknown} are none of {', '.join(STAGES)}")
    # Every measurement has a process of its own; those that wait for their turn hold memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    console = report.make_console()
    measurements = [one for stage in FLAGS.stages for one in STAGES[stage]()]
    started = time.perf_counter()
    results = one_by_one([one.prepare for one in measurements], processes=not FLAGS.small)
    for one, result in zip(measurements, results, strict=True):
        console.print(result)
        one.keep(result)
        console.print(f"{time.perf_counter() - started:.0f} s")


def record_of(name: str) -> Path:
    return Path(FLAGS.folder) / f"context_parallel_{name}.json"


def keep_part(name: str, result: Json | Exception) -> None:
    """Records a part of the stages on devices."""
    if isinstance(result, Exception):
        raise result
    Record(record_of(f"steps_{_device_name()}"), grows=True).add(**{name: result})


def stage_balance() -> Iterator[Measurement]:
    found = balance(4096 if FLAGS.small else 65536)
    Record(record_of("balance"), grows=True).add(**found)
    show(found["busiest_over_mean"], ("contiguous", "striped", "balanced"), "lengths / mask")
    yield from ()


def stage_longest() -> Iterator[Measurement]:
    old = read(record_of("longest"))
    users = 2 if FLAGS.small else longest.USERS
    described = "NVIDIA H100 80GB HBM3 (described, not present)"
    record = Record(
        record_of("longest"),
        grows=True,
        budget_GiB=FLAGS.budget_gib,
        users=users,
        compiled_for="CPU devices" if FLAGS.small else described,
    )
    conditions = ("budget_GiB", "users", "compiled_for", "commit")
    known = old.get("variants", {})
    same = all(old.get(key) == record.values[key] for key in conditions)
    variants = dict(known) if same else {}
    wanted = [one for one in longest.VARIANTS if FLAGS.remat in (None, one[1])]
    contexts = [int(context) for context in FLAGS.contexts]
    cases = longest.first_guesses(contexts, users, wanted, FLAGS.small, known)
    for case, found in longest.search(cases, FLAGS.budget_gib * longest.GIB, FLAGS.jobs):
        variants.setdefault(f"{case.mask}/{case.remat}", {})[str(case.context)] = found
        report.make_console().print(f"{case.mask}/{case.remat}, context {case.context}: {found}")
        record.add(variants=variants)
    yield from ()


def stage_steps() -> Iterator[Measurement]:
    users, length = (4, 128) if FLAGS.small else (FLAGS.users, FLAGS.length)
    rounds, seconds = (2, 0.01) if FLAGS.small else (7, 0.3)
    groups = step_cases(_devices(), users, length, FLAGS.small)
    found: dict[str, Json] = {mask: {} for mask in groups}

    def keep(mask: str, name: str, result: Json | Exception) -> None:
        found[mask] = with_speed_up(found[mask] | {name: result})
        record = Record(record_of(f"steps_{_device_name()}"), grows=True)
        record.add(devices=_devices(), steps=found)

    for mask, cases in groups.items():
        for name, case in cases.items():
            trace = str(Path(FLAGS.trace) / f"{mask}, {name}") if FLAGS.trace else None
            yield Measurement(
                functools.partial(prepare_step, case, rounds, seconds, trace),
                functools.partial(keep, mask, name),
            )


def stage_long() -> Iterator[Measurement]:
    """One user's history of 131,072 events, on all devices."""
    length = 256 if FLAGS.small else 131072
    case = Case("semi_local", 1, length, context=_devices(), strategy="halo", small=FLAGS.small)
    prepare = functools.partial(longest.prepare_training, case, 8)
    yield Measurement(prepare, functools.partial(keep_part, "long"))


def stage_confirm() -> Iterator[Measurement]:
    """Trains at the longest lengths, on one device and on two."""
    path, devices = record_of("longest"), jax.devices()
    record = read(path)
    if "variants" not in record:
        raise ValueError(f"{path} holds no lengths to confirm: run --stages=longest first")
    memory = 0.97 * (devices[0].memory_stats() or {}).get("bytes_limit", 2**33)
    runs: list[Json] = []

    def keep(bytes_found: int, result: Json | Exception) -> None:
        if isinstance(result, Exception):
            result = {"error": str(result)}
        runs.append({"bytes_found": bytes_found} | result)
        confirmed = provenance.provenance() | {"runs": runs}
        json_files.write_json(path, record | {"confirmed": confirmed})

    for context in range(1, min(2, len(devices)) + 1):
        for case, bytes_found in longest.lengths_to_confirm(record, context, memory):
            # The very program whose memory was predicted.
            prepare = functools.partial(longest.prepare_training, case, 3, longest.UNTUNED)
            yield Measurement(prepare, functools.partial(keep, bytes_found))


def stage_reshard() -> Iterator[Measurement]:
    rows, width, seconds = (4096, 16, 0.01) if FLAGS.small else (131072 * _devices(), 512, 0.1)
    measure = functools.partial(measure_reshard, _devices(), rows, width, seconds)
    yield Measurement(
        functools.partial(functools.partial, measure), functools.partial(keep_part, "reshard")
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
