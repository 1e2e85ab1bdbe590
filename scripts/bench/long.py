"""Times training steps of a long configuration beside the same model with its pieces of ULTRA-HSTU off, one at a time.

python -m scripts.bench.long --config=long_ultra [--variants=ultra,plain_causal] [--record=experiments/results/NAME.json]

A step is forward, loss, backward and optimizer, on a batch of `data.batch_users` histories of `data.max_history` events each, with random items, made on the
device. Memory is the compiler's: temporaries of the step, and the state. FLOPs are those of `ultra_hstu.flops`; rates leave out what is computed twice.
"""

import dataclasses
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags
from rich.table import Table

from experiments import command
from ultra_hstu import flops, provenance, report, workdir
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.recipe import Recipe

FLAGS = flags.FLAGS

WHOLE: dict[str, Any] = {"truncate_after": None, "truncate_length": None}
CAUSAL: dict[str, Any] = {"window": (), "full_rows": (), "prefix": ()}
VARIANTS: dict[str, dict[str, Any]] = {
    "ultra": {},
    "plain_causal": WHOLE | CAUSAL,
    "no_truncation": WHOLE,
    "no_window": CAUSAL,
    "keeps_activations": {"remat": "none"},
    "fp8": {"projection": "fp8"},
}


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    if FLAGS.implementation:
        config = with_model(config, {"implementation": FLAGS.implementation})
    names = FLAGS.variants or list(VARIANTS)
    result = {
        "config": config.name,
        "implementation": config.model.implementation,
        **provenance.provenance(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "variants": {},
    }
    console = report.make_console()
    steps = {name: Step(with_model(config, VARIANTS[name])) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:  # compilers run side by side
        for name, compiled in zip(names, pool.map(Step.compile, steps.values()), strict=True):
            result["variants"][name] = compiled
    for name, step in steps.items():
        if "error" not in result["variants"][name]:
            result["variants"][name] |= step.measure(FLAGS.seconds)
        console.print(name, result["variants"][name])
        if FLAGS.record:
            workdir.write_json(Path(FLAGS.record), result)
    console.print(table(result["variants"]))


def with_model(config: Config, changes: dict[str, Any]) -> Config:
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    changed.validate()
    return changed


class Step:
    """One variant's training step."""

    def __init__(self, config: Config):
        self.config = config
        self.recipe = Recipe(config, config.data.synthetic.items)

    def compile(self) -> dict[str, Any]:
        """Compiles the step; what the compiler says of its memory, and what it should compute. An error is part of the result."""
        started = time.perf_counter()
        try:
            state, batch = jax.eval_shape(lambda: (self.recipe.init(0), full_batch(self.config)))
            self.run = jax.jit(self.recipe.step, donate_argnums=0).lower(state, batch).compile()
        except Exception as error:  # another variant may still run
            return {"error": f"{type(error).__name__}: {error}"[:2000]}
        memory = self.run.memory_analysis()
        history, items = self.config.data.max_history, self.config.data.synthetic.items
        counted = flops.count(self.config, history, items=items)
        return {
            "model": {
                name: getattr(self.config.model, name)
                for name in (*WHOLE, *CAUSAL, "remat", "projection")
            },
            "fp8_matrix_products": (self.run.as_text() or "").count(
                'custom_call_target="__cublas$lt$matmul$f8"'
            ),
            "compile_s": time.perf_counter() - started,
            "temporary_GiB": memory.temp_size_in_bytes / 2**30 if memory else None,
            "state_GiB": memory.argument_size_in_bytes / 2**30 if memory else None,
            "training_TFLOP_a_sample": counted.training / 1e12,
            "recomputed_TFLOP_a_sample": counted.recomputed / 1e12,
            "encoder_inference_TFLOP_a_sample": (counted.projections + counted.attention) / 1e12,
        }

    def measure(self, seconds: float) -> dict[str, Any]:
        """Milliseconds a step, from samples of steps that are enqueued together."""
        config = self.config
        state, batch = jax.jit(lambda: (self.recipe.init(0), full_batch(config)))()
        state, metrics = self.run(state, batch)
        started = time.perf_counter()
        jax.block_until_ready(metrics)
        state, metrics = self.run(state, batch)
        jax.block_until_ready(metrics)
        once = time.perf_counter() - started
        each = max(1, round(seconds / once / 5))
        samples = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(each):
                state, metrics = self.run(state, batch)
            jax.block_until_ready(metrics)
            samples.append((time.perf_counter() - started) / each)
        per_step, users = statistics.median(samples), config.data.batch_users
        counted = flops.count(config, config.data.max_history, items=config.data.synthetic.items)
        work = (counted.training - counted.recomputed) * users
        return {
            "step_ms": 1e3 * per_step,
            "samples_ms": [1e3 * sample for sample in samples],
            "events_a_second": users * config.data.max_history / per_step,
            "TFLOP_a_second": work / per_step / 1e12,
            "loss": float(metrics["loss"]),
        }


def full_batch(config: Config) -> Batch:
    """Every history at its full length, items uniform."""
    users, history = config.data.batch_users, config.data.max_history
    rows = users * history
    item_T1 = jax.random.randint(
        jax.random.key(0), (rows + 1,), 1, config.data.synthetic.items + 1, jnp.int32
    )
    time_T = jnp.arange(rows, dtype=jnp.int32)
    offsets = jnp.arange(users + 1, dtype=jnp.int32) * history
    return Batch(
        item_T1[:-1],
        time_T,
        time_T + 1,
        item_T1[1:],
        jnp.ones(rows, jnp.float32),
        offsets,
        offsets[1:] - 1,
    )


def table(variants: dict[str, Any]) -> Table:
    columns = (
        "step_ms",
        "temporary_GiB",
        "training_TFLOP_a_sample",
        "encoder_inference_TFLOP_a_sample",
        "TFLOP_a_second",
        "error",
    )
    out = Table("variant", *columns)
    for name, values in variants.items():
        cells = (values.get(column, "") for column in columns)
        out.add_row(
            name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell)[:80] for cell in cells)
        )
    return out


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "a file of experiments/configs", lock_config=True
    )
    flags.DEFINE_list("variants", None, "names of variants; all by default")
    flags.DEFINE_string(
        "implementation", None, "of attention; that of the configuration by default"
    )
    flags.DEFINE_float("seconds", 1.0, "time to measure a variant for")
    flags.DEFINE_string("record", None, "JSON file for the result")
    flags.mark_flag_as_required("config")
    command.run(main)
