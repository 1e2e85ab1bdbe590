"""What one layer of a configuration costs: bytes a token that are kept for the backward pass, and time, under each way of keeping and recomputing.

python -m scripts.bench.layer --config=long_ultra [--rows=65536] [--record=experiments/results/NAME.json]

Two stacks of different depth are compiled, loss and gradients of input and parameters; a layer is their difference, divided. The sequences fill the buffer, as
long as the configuration's histories, and there is no truncation. Memory is the compiler's count of temporaries.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from ml_collections import config_flags
from rich.table import Table

from experiments import command
from kernels.timing import device_time
from ultra_hstu import flops, provenance, report, workdir
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sequences import Sequences

FLAGS = flags.FLAGS

MODES: dict[str, dict[str, Any]] = {
    "none": {"remat": "none"},
    "selective": {"remat": "selective"},
    "selective 8 chunks": {
        "remat": "selective",
        "chunk_rows": 8,
    },  # the number of chunks, until the rows are known
    "full": {"remat": "full"},
    "fp8": {"remat": "none", "projection": "fp8"},
}


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    names, depths = FLAGS.modes or list(MODES), [int(depth) for depth in FLAGS.depths]
    result = {
        "config": config.name,
        "rows": FLAGS.rows,
        "depths": depths,
        **provenance.provenance(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "modes": {},
    }
    cases = [(name, depth) for name in names for depth in depths]
    with ThreadPoolExecutor(len(cases)) as pool:  # compilers run side by side
        compiled = dict(
            zip(
                cases,
                pool.map(lambda case: stack_gradients(changed(config, *case), FLAGS.rows), cases),
                strict=True,
            )
        )
    console, table = report.make_console(), Table("mode", "bytes a token", "ms a layer", "TFLOP/s")
    for name in names:
        result["modes"][name] = a_layer(
            [compiled[name, depth] for depth in depths],
            depths,
            changed(config, name, depths[0]),
            FLAGS.rows,
        )
        table.add_row(
            name,
            *(
                f"{result['modes'][name].get(key, float('nan')):.4g}"
                for key in ("bytes_a_token", "ms", "TFLOP_a_second")
            ),
        )
        if FLAGS.record:
            workdir.write_json(Path(FLAGS.record), result)
    console.print(table)


def changed(config: Config, name: str, depth: int) -> Config:
    changes = {"layers": depth, "truncate_after": None, "truncate_length": None} | MODES[name]
    if "chunk_rows" in changes:
        changes["chunk_rows"] = FLAGS.rows // changes["chunk_rows"]
    if FLAGS.implementation:
        changes["implementation"] = FLAGS.implementation
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def stack_gradients(config: Config, rows: int) -> tuple[Any, Any]:
    """The compiled gradient of a stack, and a function that makes its arguments."""
    dtype, length = jnp.dtype(config.model.dtype), min(config.data.max_history, rows)
    build = lambda: HSTU.from_config(config.model, length, rngs=nnx.Rngs(0))  # noqa: E731
    graph = nnx.split(nnx.eval_shape(build))[0]

    def arguments() -> tuple[Any, jax.Array, jax.Array, Sequences]:
        offsets = jnp.arange(rows // length + 1, dtype=jnp.int32) * length
        row_T = jnp.arange(rows, dtype=jnp.int32)
        x_TD, g_TD = jax.random.normal(jax.random.key(0), (2, rows, config.model.width)).astype(
            dtype
        )
        return (
            nnx.split(build())[1],
            x_TD,
            g_TD,
            Sequences(offsets, row_T < offsets[-1], row_T, row_T + 1),
        )

    def loss(params: Any, x_TD: jax.Array, g_TD: jax.Array, sequences: Sequences) -> jax.Array:
        return jnp.sum((nnx.merge(graph, params)(x_TD, sequences) * g_TD).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        *jax.eval_shape(arguments)
    ).compile(), arguments


def a_layer(
    stacks: list[tuple[Any, Any]], depths: list[int], config: Config, rows: int
) -> dict[str, Any]:
    """The difference of two stacks, a layer."""
    more = depths[1] - depths[0]
    memory = [run.memory_analysis().temp_size_in_bytes for run, _ in stacks]
    result: dict[str, Any] = {
        "bytes_a_token": (memory[1] - memory[0]) / more / rows,
        "temporary_GiB": [size / 2**30 for size in memory],
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
    work = (counted.training - counted.recomputed) / depths[0] * (rows // length)
    return result | {
        "ms": 1e3 * seconds,
        "stack_ms": [1e3 * time.seconds for time in times],
        "TFLOP": work / 1e12,
        "TFLOP_a_second": work / seconds / 1e12,
    }


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "a file of experiments/configs", lock_config=True
    )
    flags.DEFINE_integer("rows", 65536, "tokens in a batch")
    flags.DEFINE_list("depths", ["2", "4"], "layers of the two stacks")
    flags.DEFINE_bool("times", True, "measure times, not memory alone")
    flags.DEFINE_list("modes", None, "names of modes; all by default")
    flags.DEFINE_string(
        "implementation", None, "of attention; that of the configuration by default"
    )
    flags.DEFINE_string("record", None, "JSON file for the result")
    flags.mark_flag_as_required("config")
    command.run(main)
