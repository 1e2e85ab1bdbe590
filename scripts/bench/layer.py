"""What one layer of a configuration costs, under each way of keeping and recomputing.

python -m scripts.bench.layer --config=long_ultra [--rows=65536]
    [--record=experiments/results/NAME.json]

Bytes a token that are kept for the backward pass, and time. Two stacks of different depth are
compiled, loss and gradients of input and parameters; a layer is their difference, divided. The
sequences fill the buffer, as long as the configuration's histories, and there is no truncation.
Memory is the compiler's count of temporaries.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments import command
from experiments.record import Json, Record
from kernels.timing import device_time
from scripts.bench.program import temporaries
from scripts.bench.terminal import show
from ultra_hstu import flops
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.fields import changed
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sequences import Sequences

FLAGS = flags.FLAGS
WHOLE: Json = {"truncate_after": None, "truncate_length": None}
CHUNKS = 8
Arguments = tuple[nnx.State, jax.Array, jax.Array, Sequences]


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    if FLAGS.implementation:
        config = changed(config, model={"implementation": FLAGS.implementation})
    rows, depths = FLAGS.rows, [int(depth) for depth in FLAGS.depths]
    modes: dict[str, Json] = {
        "none": {"remat": "none"},
        "selective": {"remat": "selective"},
        f"selective {CHUNKS} chunks": {"remat": "selective", "chunk_rows": rows // CHUNKS},
        "fp8": {"remat": "none", "projection": "fp8"},
    }
    record = Record(FLAGS.record, config=config.name, rows=rows, depths=depths)

    def with_layers(name: str, depth: int) -> Config:
        return changed(config, model=WHOLE | modes[name] | {"layers": depth})

    names = FLAGS.modes or list(modes)
    cases = [with_layers(name, depth) for name in names for depth in depths]
    with ThreadPoolExecutor(len(cases)) as pool:  # compilers run side by side
        stacks = list(pool.map(lambda case: stack_gradients(case, rows), cases))
    found = {}
    for number, name in enumerate(names):
        first = number * len(depths)
        more = depths[1] - depths[0]
        found[name] = a_layer(stacks[first : first + 2], more, cases[first], rows)
        record.add(modes=found)
    show(found, ("bytes_a_token", "ms", "TFLOP_a_second"), "mode")


def stack_gradients(
    config: Config, rows: int
) -> tuple[jax.stages.Compiled, Callable[[], Arguments]]:
    """The compiled gradient of a stack, and a function that makes its arguments."""
    dtype, length = jnp.dtype(config.model.dtype), min(config.data.max_history, rows)

    def build() -> HSTU:
        return HSTU.from_config(config.model, length, rngs=nnx.Rngs(0))

    graph = nnx.split(nnx.eval_shape(build))[0]

    def arguments() -> Arguments:
        offsets = jnp.arange(rows // length + 1, dtype=jnp.int32) * length
        row_T = jnp.arange(rows, dtype=jnp.int32)
        arrays = jax.random.normal(jax.random.key(0), (2, rows, config.model.width))
        x_TD, g_TD = arrays.astype(dtype)
        sequences = Sequences(offsets, row_T < offsets[-1], row_T, row_T + 1)
        return nnx.split(build())[1], x_TD, g_TD, sequences

    def loss(
        params: nnx.State, x_TD: jax.Array, g_TD: jax.Array, sequences: Sequences
    ) -> jax.Array:
        return jnp.sum((nnx.merge(graph, params)(x_TD, sequences) * g_TD).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return gradient.lower(*jax.eval_shape(arguments)).compile(), arguments


def a_layer(
    stacks: list[tuple[jax.stages.Compiled, Callable[[], Arguments]]],
    more: int,
    config: Config,
    rows: int,
) -> Json:
    """A layer: the difference of two stacks, of `config` and of so many more layers, divided."""
    sizes = [temporaries(run) for run, _ in stacks]
    result: Json = {
        "bytes_a_token": (sizes[1] - sizes[0]) / more / rows,
        "temporary_GiB": [size / 2**30 for size in sizes],
    }
    if not FLAGS.times:
        return result
    times = [
        device_time(run, *jax.jit(arguments)(), repetitions=5, sample_seconds=0.1)
        for run, arguments in stacks
    ]
    seconds = (times[1].seconds - times[0].seconds) / more
    length = min(config.data.max_history, rows)
    counted = flops.count(config, length)
    work = (counted.training - counted.recomputed) / config.model.layers * (rows // length)
    return result | {
        "ms": 1e3 * seconds,
        "stack_ms": [1e3 * time.seconds for time in times],
        "TFLOP": work / 1e12,
        "TFLOP_a_second": work / seconds / 1e12,
    }


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("rows", 65536, "tokens in a batch")
    flags.DEFINE_list("depths", ["2", "4"], "layers of the two stacks")
    flags.DEFINE_bool("times", True, "measure times, not memory alone")
    flags.DEFINE_list("modes", None, "names of modes; all by default")
    flags.DEFINE_string(
        "implementation", None, "of attention; that of the configuration by default"
    )
    command.define_record()
    command.run(main)
