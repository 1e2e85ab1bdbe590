"""Mini-sequences, measured: the longest sequence that trains, and what a device holds.

    # counted by the CPU compiler for CPU devices, 1 to 8: within 90 minutes of one core; goes on
    # where it was
    python -m scripts.bench.mini_sequences --stages=head,state,longest
    # on one Hopper GPU: 16 cases within 40 minutes; goes on where it was
    python -m scripts.bench.mini_sequences --stages=confirm --contexts=1
    # the longest sequence of context parallelism on two GPUs against one: within 10 minutes
    python -m scripts.bench.mini_sequences --stages=confirm --contexts=1,2 --models=hstu
        --modes=nothing --strategies=ring
    # a small model, on CPU devices
    python -m scripts.bench.mini_sequences --small --stages=head,state,longest,confirm
        --budget_gib=0.01

`longest` compiles the whole training step of one history, at lengths whose memory comes nearer and
nearer to `--budget_gib`, until it is within 3 % below. Attention is `xla` there, in float32, for
the CPU compiler widens bfloat16. `confirm` searches again, by the compiler for the GPUs that are
here and within their memory, in bfloat16 with the Hopper kernels, with 64 histories that share the
rows, so that attention takes little of the time. It trains three steps of that batch, which must
run, and one of a batch 10 % longer, which must not. Near a full GPU, XLA may compute again what it
chooses by itself. On a GPU the full softmax keeps no logits in any mode: its kernel is `triton`.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from experiments import command
from experiments.record import Json, Record, read
from scripts.bench.context_parallel_longest import GIB, prepare_training
from scripts.bench.mini_sequences_case import (
    CATALOGUE,
    MODELS,
    MODES,
    QUICK,
    STRATEGIES,
    SequenceCase,
    Strategy,
    bytes_by_part,
    nearly_longest,
)
from scripts.bench.program import temporaries
from scripts.bench.turns import one_by_one
from ultra_hstu import report
from ultra_hstu.retrieval.loss import softmax_loss

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
HEAD_ROWS, WIDTH = 16384, 512  # of the stage `head`
HEAD_CHUNKS = (16384, 4096, 2048, 1024, 512, 256, 128)
# First guesses, in rows of a device.
GUESSES = {"nothing": 196608, "selective": 491520, "mini-sequences": 393216, "both": 983040}
ONE: tuple[Strategy, ...] = ("auto",)
LONGER = 1.1  # a batch that must not fit: it has more than the memory that was left out


def main(_: list[str]) -> None:
    for flag, known in KNOWN.items():
        if unknown := sorted(set(getattr(FLAGS, flag)) - set(known)):
            raise ValueError(f"--{flag}: {unknown} are none of {', '.join(known)}")
    if "confirm" not in FLAGS.stages or FLAGS.small:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    for stage in FLAGS.stages:
        STAGES[stage]()


def path_of(name: str) -> Path:
    return Path(FLAGS.folder) / f"mini_sequences{name}.json"


def cases(*, on_gpu: bool = False) -> Iterator[tuple[str, SequenceCase]]:
    """The cases that the flags ask for, each with its name in a record; one device first."""
    for context in map(int, FLAGS.contexts):
        for model in FLAGS.models:
            if context > 1 and model.startswith("sasrec"):
                continue  # its dense attention is not divided
            for mode, strategy in itertools.product(MODES, STRATEGIES if context > 1 else ONE):
                if mode not in FLAGS.modes or strategy not in ("auto", *FLAGS.strategies):
                    continue
                case = SequenceCase(
                    model,
                    mode,
                    0,
                    context=context,
                    strategy=strategy,
                    on_gpu=on_gpu,
                    small=FLAGS.small,
                )
                name = f"{model}/{mode}/{context}"
                yield name if context == 1 else f"{name}/{strategy}", case


def stage_longest() -> None:
    """The longest history of each case, and what a device holds then."""
    conditions = {"budget_GiB": FLAGS.budget_gib, "small": FLAGS.small}
    record, found = _resumed("", "longest", conditions)
    for name, case in cases():
        if name in found:
            continue
        started = time.perf_counter()
        known = found.get(f"{case.model}/{case.mode}/1", {}).get("longest")
        rows = known or _guess(case)
        found[name] = nearly_longest(
            dataclasses.replace(case, length=rows * case.context),
            FLAGS.budget_gib * GIB,
            lambda case: bytes_by_part(case.compiled(jax.devices())),
            case.step,
        ) | {"seconds": time.perf_counter() - started, "commit": record.values["commit"]}
        report.make_console().print(name, found[name])
        record.add(longest=found)


def stage_state() -> None:
    """What a device holds at one length, by how AdamW and the tables keep their state."""
    rows, items = (256, 200) if FLAGS.small else (131072, CATALOGUE)
    record = Record(path_of("_state"), rows=rows, items=items, small=FLAGS.small)
    found: dict[str, Json] = {}
    options: dict[str, Json] = {
        "full": {},
        "full, state_dtype=bfloat16": {"state_dtype": "bfloat16"},
        "sampled": {},
        "sampled, state_dtype=bfloat16": {"state_dtype": "bfloat16"},
        "sampled, tables=lazy_adam": {"tables": "lazy_adam"},
        "sampled, tables=rowwise_adagrad": {"tables": "rowwise_adagrad"},
        "full, 8 devices": {"context": 8, "strategy": "ring", "length": 8 * rows},
        "full, 8 devices, state_dtype=bfloat16": {
            "context": 8,
            "strategy": "ring",
            "length": 8 * rows,
            "state_dtype": "bfloat16",
        },
    }
    if FLAGS.small:
        options = {name: one for name, one in options.items() if "8 devices" not in name}
    for name, changes in options.items():
        model = "hstu_ffn_full" if name.startswith("full") else "hstu_ffn"
        case = SequenceCase(model, "both", rows, catalogue=items, small=FLAGS.small)
        case = dataclasses.replace(case, **changes)
        found[name] = bytes_by_part(case.compiled(jax.devices()))
        report.make_console().print(name, found[name])
        record.add(state=found)


def stage_head() -> None:
    """Temporaries of a full softmax and its gradients, by rows of a chunk."""
    rows, items, width = (64, 200, 8) if FLAGS.small else (HEAD_ROWS, CATALOGUE, WIDTH)
    chunks = (64, 16) if FLAGS.small else HEAD_CHUNKS
    record = Record(path_of("_head"), rows=rows, items=items, width=width, implementation="xla")
    found: Json = {}
    shapes = [(rows, width), (items + 1, width), (rows,), (rows,)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    given = [jax.ShapeDtypeStruct(*one) for one in zip(shapes, dtypes, strict=True)]
    for chunk in chunks:

        def loss(
            h_TD: jax.Array,
            table_ID: jax.Array,
            positive_T: jax.Array,
            weight_T: jax.Array,
            chunk: int = chunk,
        ) -> jax.Array:
            return softmax_loss(
                h_TD,
                table_ID,
                positive_T,
                weight_T,
                temperature=0.05,
                l2_normalize=True,
                chunk_rows=chunk,
                implementation="xla",
            )[0]

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        found[str(chunk)] = {"temporaries": temporaries(step.lower(*given).compile(QUICK))}
        report.make_console().print(chunk, found[str(chunk)])
        record.add(chunks=found)


def stage_confirm() -> None:
    """Trains just below the longest batch of these devices, and fails just above."""
    devices = jax.devices()
    budget = 0.97 * (devices[0].memory_stats() or {}).get("bytes_limit", 2**23)
    kind = devices[0].device_kind.lower()
    device = next((name for name in ("h100", "h200", "cpu") if name in kind), "gpu")
    users = 2 if FLAGS.small else 64
    conditions = {"users": users, "small": FLAGS.small}
    record, found = _resumed(f"_{device}", "confirmed", conditions)
    on_gpu = devices[0].platform == "gpu"
    for name, case in cases(on_gpu=on_gpu):
        if name in found or case.context > len(devices):
            continue
        case = dataclasses.replace(case, users=users)
        guess = _guess(case) * case.context // users
        first = dataclasses.replace(case, length=max(guess, _unit(case)))
        [result] = one_by_one(
            [functools.partial(_prepare, first, budget)], processes=not FLAGS.small
        )
        result = {"error": str(result)} if isinstance(result, Exception) else result
        found[name] = result | {"commit": record.values["commit"]}
        report.make_console().print(name, found[name])
        record.add(confirmed=found)


def _guess(case: SequenceCase) -> int:
    """Rows of a device to begin with."""
    if FLAGS.small:
        return 64
    if case.model.startswith("sasrec"):  # whose memory its dense attention fills
        return 6144 if case.mode in ("nothing", "selective") else 28672
    whole_logits = case.full and not case.on_gpu and case.mode in ("nothing", "selective")
    return 6144 if whole_logits else GUESSES[case.mode]


def _unit(case: SequenceCase) -> int:
    """The unit of lengths of each of the histories."""
    return max(1, case.step // case.users)


def _prepare(case: SequenceCase, budget: float) -> Callable[[], Json]:
    """Compiles the longest batch; what it returns trains it, and then a longer one."""

    def measure(case: SequenceCase) -> Json:
        return bytes_by_part(case.compiled(jax.devices()))

    found = nearly_longest(case, budget, measure, _unit(case))
    below = dataclasses.replace(case, length=found["longest"])
    length = -(-int(LONGER * below.length) // _unit(case)) * _unit(case)
    above = dataclasses.replace(case, length=length)
    train = prepare_training(below, 3)

    def run() -> Json:
        trained = train()
        seconds = min(trained["step_ms"][1:]) / 1e3
        result = found | trained | {"rows": below.rows, "rows_a_second": below.rows / seconds}
        try:
            prepare_training(above, 1)()
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0][:200]
        else:
            said = "it ran"
        return result | {"above": {"rows": above.rows, "said": said}}

    return run


def _resumed(name: str, part: str, conditions: Json) -> tuple[Record, Json]:
    """A record that goes on where the same command was, and what it holds.

    Other versions of JAX, or other conditions, start it anew; every entry names its own commit.
    """
    old = read(path_of(name))
    record = Record(path_of(name), **conditions)
    same = all(old.get(key) == record.values[key] for key in (*conditions, "versions"))
    return record, dict(old.get(part, {})) if same else {}


STAGES = {
    "longest": stage_longest,
    "state": stage_state,
    "head": stage_head,
    "confirm": stage_confirm,
}
KNOWN: dict[str, Collection[str]] = {
    "stages": STAGES,
    "models": MODELS,
    "modes": MODES,
    "strategies": STRATEGIES,
}

if __name__ == "__main__":
    flags.DEFINE_list("stages", ["head", "state", "longest"], f"of {', '.join(STAGES)}")
    flags.DEFINE_list("models", list(MODELS), f"of {', '.join(MODELS)}")
    flags.DEFINE_list("modes", list(MODES), f"of {', '.join(MODES)}")
    flags.DEFINE_list("contexts", ["1", "8", "2", "4"], "devices that share the history")
    flags.DEFINE_list("strategies", ["ring", "ulysses"], "of attention over several devices")
    flags.DEFINE_float("budget_gib", 80.0, "memory of a device in the stage `longest`")
    flags.DEFINE_bool("small", False, "a model and lengths that a CPU can do")
    flags.DEFINE_string("folder", str(RESULTS), "where the records go")
    command.run(main)
