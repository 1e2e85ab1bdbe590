"""Times ranking steps whose tables are updated entry by entry, and last layers of what is read.

python -m scripts.bench.tables [--parts=step,last_layer,sizes,repeated] [--small]
    [--record=experiments/results/NAME.json]
python -m scripts.bench.tables --parts=step,sizes,repeated --remat=none
    --record=experiments/results/step_h200.json

step: a stack of 8 layers, D = 1,024, 4 heads of 256, on 32 requests of 4,096 rows that ask about 16
    targets; a table of a million items. MFU counts the products of the encoder and the head.
last_layer: forward and backward of one layer of such a stack, whole and for the targets alone.
sizes: the same small model over tables of a million and of a hundred million items, D = 128.
repeated: lookup, gradient and update of 2.69 M ids of which 2.4 % are distinct (MLPerf's
    dlrm_v4_hstu), and as many distinct ones, with and without deduplication. Without it every id is
    looked up and updated by itself, which is another rule: squares of equal ids are added one by
    one.
--small: tiny sizes, to try the commands.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from experiments import command
from experiments.record import Json, Record
from kernels.timing import device_time
from scripts.bench.program import temporaries
from scripts.bench.terminal import show
from ultra_hstu import flops
from ultra_hstu.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RankConfig,
    TrainConfig,
)
from ultra_hstu.entry_updates import EntryUpdate, RowwiseAdagrad
from ultra_hstu.fields import changed
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.parallel.embedding_sharding import Entries, lookup
from ultra_hstu.parallel.shards import ONE
from ultra_hstu.ranking.batch import RankBatch, RankEvents, RankGather
from ultra_hstu.ranking.form import EVERYTHING, Sizes
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.sequences import Sequences
from ultra_hstu.step import TrainState

FLAGS = flags.FLAGS
PEAK_TFLOPS = 989.0  # of bfloat16 products, H100 and H200
TARGETS = 16
OPTIM = OptimConfig(tables="rowwise_adagrad")
Part = Callable[[], Iterator[tuple[str, Json]]]


@dataclasses.dataclass(frozen=True)
class Sizing:
    """Sizes of a stack and of its batch."""

    width: int
    heads: int
    head_width: int
    layers: int
    users: int
    length: int  # rows of a request


LARGE, SMALL_STACK = Sizing(1024, 4, 256, 8, 32, 4096), Sizing(128, 2, 64, 1, 64, 512)
TINY = Sizing(16, 2, 8, 2, 2, 64)


def config_of(size: Sizing, *, tables: str = "rowwise_adagrad", remat: str = "none") -> Config:
    config = Config(
        name="ranking_step",
        data=DataConfig(max_history=size.length - TARGETS, batch_users=size.users),
        model=ModelConfig(
            width=size.width,
            layers=size.layers,
            heads=size.heads,
            qk_width=size.head_width,
            v_width=size.head_width,
            preset="production",
            relative_bias=False,
            output_slots=0,
            input_dropout=0.0,
            linear_dropout=0.0,
            dtype="bfloat16",
        ),
        rank=RankConfig(tasks=("like",), signals=("like",), targets=TARGETS),
        optim=OPTIM,
        train=TrainConfig(protocol="chronological"),
    )
    return changed(config, model={"remat": remat}, optim={"tables": tables})


def recipe_of(config: Config, items: int) -> RankRecipe:
    sizes = Sizes(
        items, signals=(3,), features=(), contextual=(), kinds=("binary",), timestamps=True
    )
    return RankRecipe(config, sizes)


def batch_of(size: Sizing, items: int, seed: int) -> RankBatch:
    """Requests at their full length; items are uniform over the table."""
    rng, events = np.random.default_rng(seed), size.users * size.length
    none = np.zeros((events, 0), np.int32)
    data = RankEvents(
        item_E=rng.integers(1, items + 1, events).astype(np.int32),
        time_E=np.arange(events, dtype=np.int32),
        signal_ES=rng.integers(1, 3, (events, 1)).astype(np.int32),
        feature_EF=none,
        label_EK=rng.integers(0, 2, (events, 1)).astype(np.float32),
        weight_EK=np.ones((events, 1), np.float32),
        context_UC=np.zeros((size.users, 0), np.int32),
        index={},
    )
    user_B = np.arange(size.users, dtype=np.int32)
    start_B, history = user_B * size.length, size.length - TARGETS
    columns = {
        "user": user_B,
        "target": start_B + history,
        "count": np.full(size.users, TARGETS, np.int32),
        f"start/{EVERYTHING}": start_B,
        f"stop/{EVERYTHING}": start_B + history,
    }
    gather = RankGather((events,), (EVERYTHING,), TARGETS, contextual=0, interleaved=False)
    return jax.tree.map(jnp.asarray, gather(data, columns, np))


def state_of(recipe: RankRecipe) -> TrainState:
    """An initial state whose table is no random draw, which takes room where it is large."""
    few = dataclasses.replace(recipe, sizes=dataclasses.replace(recipe.sizes, items=7))
    state = jax.jit(few.init, static_argnums=0)(0)
    wanted = jax.eval_shape(lambda: recipe.init(0))

    def filled(path: PyTree, leaf: Array, want: jax.ShapeDtypeStruct) -> Array:
        if leaf.shape == want.shape:
            return leaf
        if "params" not in jax.tree_util.keystr(path):
            return jnp.zeros(want.shape, want.dtype)
        return jax.jit(_pattern, static_argnums=0)(want.shape)

    return jax.tree_util.tree_map_with_path(filled, state, wanted)


def _pattern(shape: tuple[int, int]) -> Float[Array, "X D"]:
    row_X1, column_1D = (jax.lax.broadcasted_iota(jnp.float32, shape, axis) for axis in (0, 1))
    return 0.02 * jnp.sin(row_X1 * 0.7 + column_1D * 1.3)


def compiled_step(recipe: RankRecipe, batch: RankBatch) -> jax.stages.Compiled:
    """A step whose state is donated."""
    step = jax.jit(recipe.step, donate_argnums=0)
    return step.lower(jax.eval_shape(lambda: recipe.init(0)), batch).compile()


def timed_steps(
    recipe: RankRecipe,
    compiled: jax.stages.Compiled,
    batches: list[RankBatch],
    samples: int,
    calls: int,
) -> Json:
    """Milliseconds of a step, and bytes of the program and of the device."""
    state = state_of(recipe)
    found = []
    for number in range(samples + 1):
        started = time.perf_counter()
        for call in range(calls):
            state, metrics = compiled(state, batches[call % len(batches)])
        loss = float(metrics["loss"])
        if number:  # the first warms up
            found.append(1e3 * (time.perf_counter() - started) / calls)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "ms": statistics.median(found),
        "samples_ms": found,
        "loss": loss,
        "temporaries_GiB": temporaries(compiled) / 2**30,
        "peak_GiB": memory.get("peak_bytes_in_use", math.nan) / 2**30,
    }


def part_step() -> Iterator[tuple[str, Json]]:
    size, items = (TINY, 1000) if FLAGS.small else (LARGE, 10**6)
    batches = [batch_of(size, items, seed) for seed in range(2)]
    history = size.length - TARGETS
    for remat in FLAGS.remat:
        config = config_of(size, remat=remat)
        counted = flops.count(config, history, targets=TARGETS)
        tflop = size.users * (counted.training - counted.recomputed) / 1e12
        recipe = recipe_of(config, items)
        program = compiled_step(recipe, batches[0])
        found = timed_steps(recipe, program, batches, samples=5, calls=4)
        rate = tflop / found["ms"] * 1e3
        yield (
            f"step, remat {remat}",
            found
            | {
                "TFLOP": tflop,
                "TFLOP_a_second": rate,
                "MFU": rate / PEAK_TFLOPS,
                "tokens_a_second": size.users * size.length / found["ms"] * 1e3,
                "items": items,
            }
            | dataclasses.asdict(size),
        )


def part_last_layer() -> Iterator[tuple[str, Json]]:
    size = dataclasses.replace(TINY if FLAGS.small else LARGE, layers=1)
    rows, config = size.users * size.length, config_of(size)

    def build() -> HSTU:
        return HSTU.from_config(config.model, size.length, rngs=nnx.Rngs(0))

    graph = nnx.split(nnx.eval_shape(build))[0]

    def arguments() -> tuple[PyTree, Array, Array, Sequences, Int[Array, " P"]]:
        offsets = jnp.arange(size.users + 1, dtype=jnp.int32) * size.length
        row_T = jnp.arange(rows, dtype=jnp.int32)
        x_TD, g_TD = jax.random.normal(jax.random.key(0), (2, rows, size.width)).astype("bfloat16")
        sequences = Sequences(
            offsets,
            row_T < rows,
            row_T,
            row_T + 1,
            num_targets=jnp.full(size.users, TARGETS, jnp.int32),
            max_targets=TARGETS,
        )
        read_P = (offsets[1:, None] - TARGETS + jnp.arange(TARGETS)[None]).reshape(-1)
        return nnx.split(build())[1], x_TD, g_TD[: len(read_P)], sequences, read_P

    def loss(
        whole: bool, params: PyTree, x_TD: Array, g_PD: Array, sequences: Sequences, read_P: Array
    ) -> Float[Array, ""]:
        model = nnx.merge(graph, params)
        y_PD = model(x_TD, sequences)[read_P] if whole else model.rows(x_TD, sequences, read_P)
        return jnp.sum((y_PD * g_PD).astype(jnp.float32))

    given = jax.jit(arguments)()
    for name, whole in (("of the targets", False), ("whole", True)):
        run = jax.jit(jax.grad(functools.partial(loss, whole), argnums=(0, 1)))
        timing = device_time(run, *given, repetitions=5, sample_seconds=0.1)
        yield (
            f"last layer, {name}",
            {
                "ms": 1e3 * timing.seconds,
                "samples_ms": [1e3 * sample for sample in timing.samples],
            }
            | dataclasses.asdict(size),
        )


def part_sizes() -> Iterator[tuple[str, Json]]:
    size = TINY if FLAGS.small else SMALL_STACK
    small, large = (10**4, 10**6) if FLAGS.small else (10**6, 10**8)
    cases = [(tables, small) for tables in FLAGS.tables]
    cases += [(tables, large) for tables in FLAGS.tables if tables == "rowwise_adagrad"]
    recipes = [recipe_of(config_of(size, tables=tables), items) for tables, items in cases]
    programs = [compiled_step(recipe, batch_of(size, 10**4, 0)) for recipe in recipes]
    for (tables, items), recipe, program in zip(cases, recipes, programs, strict=True):
        batches = [batch_of(size, items, seed) for seed in range(4)]
        found = timed_steps(recipe, program, batches, samples=5, calls=20)
        yield (
            f"{tables}, {items:,} items",
            found
            | {
                "tables": tables,
                "items": items,
            }
            | dataclasses.asdict(size),
        )


def part_repeated() -> Iterator[tuple[str, Json]]:
    many, items, width = (2000, 10**4, 16) if FLAGS.small else (2_690_000, 10**7, 512)
    update = EntryUpdate(OPTIM, RowwiseAdagrad(), devices=1)
    table = nnx.Param

    def with_it(table_XD: Array, sum_X1: Array, id_N: Array) -> tuple[Array, Array]:
        entries = Entries.of(table_XD, id_N, ONE)

        def look(row_UD: Array) -> Array:
            return lookup(dataclasses.replace(entries, row_uD=row_UD), id_N, ONE)

        found_ND, pull = jax.vjp(look, entries.row_uD)
        (grad_UD,) = pull(1e-3 * found_ND)
        new, (state,) = update(
            table(table_XD), (table(sum_X1),), entries.number_u, grad_UD, jnp.int32(0)
        )
        return new[...], state[...]

    def without_it(table_XD: Array, sum_X1: Array, id_N: Array) -> tuple[Array, Array]:
        grad_ND = 1e-3 * table_XD[id_N]
        sum_X1 = sum_X1.at[id_N].add(jnp.mean(jnp.square(grad_ND), axis=1, keepdims=True))
        change_ND = grad_ND / (jnp.sqrt(sum_X1[id_N]) + 1e-8)
        return table_XD.at[id_N].add(-OPTIM.learning_rate * change_ND), sum_X1

    rng = np.random.default_rng(0)
    few = rng.choice(items, max(1, int(0.024 * many)), replace=False)
    drawn = {"2.4 % distinct": rng.choice(few, many), "all distinct": rng.permutation(items)[:many]}
    shapes = ((items, width), jnp.float32), ((items, 1), jnp.float32), ((many,), jnp.int32)
    programs = {
        kind: jax.jit(function, donate_argnums=(0, 1))
        .lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        .compile()
        for kind, function in (("with", with_it), ("without", without_it))
    }
    for kind, run in programs.items():
        state = (jax.jit(_pattern, static_argnums=0)((items, width)), jnp.zeros((items, 1)))
        for ids, host_N in drawn.items():
            id_N, samples = jnp.asarray(host_N, jnp.int32), []
            for _ in range(6):
                started = time.perf_counter()
                state = run(*state, id_N)
                float(state[1][0, 0])
                samples.append(1e3 * (time.perf_counter() - started))
            yield (
                f"{ids}, {kind} deduplication",
                {
                    "ms": statistics.median(samples[1:]),
                    "samples_ms": samples[1:],
                    "ids": many,
                    "items": items,
                    "width": width,
                },
            )
        del state


PARTS: dict[str, Part] = {
    "step": part_step,
    "last_layer": part_last_layer,
    "sizes": part_sizes,
    "repeated": part_repeated,
}


def main(_: list[str]) -> None:
    record = Record(FLAGS.record, grows=True)
    for name in FLAGS.parts:
        found = {}
        for case, values in PARTS[name]():
            found[case] = values
            record.add(**{name: found})
        show(found, ("ms", "MFU", "tokens_a_second", "peak_GiB"), name)


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), "what is measured")
    flags.DEFINE_list("remat", ["none", "selective"], "of the part `step`")
    flags.DEFINE_list("tables", ["rowwise_adagrad", "same"], "of the part `sizes`")
    flags.DEFINE_bool("small", False, "tiny sizes")
    command.define_record()
    command.run(main)
