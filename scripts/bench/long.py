"""Times training steps of a long configuration beside those with its pieces off, one at a time.

# one Hopper GPU
python -m scripts.bench.long --config=long_ultra [--variants=ultra,plain_causal]
    --record=experiments/results/long_ultra_h200.json
# operations alone, on any machine
python -m scripts.bench.long --config=long_ultra --count
    --variants=ultra,paper_layer,plain_causal,no_truncation,no_window
    --record=experiments/results/long_operations.json
# two Hopper GPUs of one host, in at most 6 minutes
python -m scripts.bench.long --config=long_mst --record=experiments/results/long_mst_h200.json

Predicted for all variants of long_ultra: `4 minutes` of an H200. With --count nothing is run, and
the record has operations alone.

A step is forward, loss, backward and optimizer, on a batch of `data.batch_users` histories of
`data.max_history` events each, with random items, made on the device. Memory is the compiler's:
temporaries of the step, and the state. FLOPs are those of `ultra_hstu.flops`; rates leave out what
is computed twice.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.bench.program import Program
from scripts.bench.terminal import show
from ultra_hstu import flops
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.fields import changed

FLAGS = flags.FLAGS

WHOLE: Json = {"truncate_after": None, "truncate_length": None}
CAUSAL: Json = {"window": (), "full_rows": (), "prefix": ()}
BLOCKS: Json = {"feed_forward": 2048}
OF_ULTRA: dict[str, Json] = {
    "ultra": {},
    "plain_causal": WHOLE | CAUSAL,
    "no_truncation": WHOLE,
    "no_window": CAUSAL,
    "keeps_activations": {"remat": "none"},
    "fp8": {"projection": "fp8"},
    "paper_layer": {"preset": "research", "alpha": None},
}
OF_MST: dict[str, Json] = {
    "mst": {},
    "all_rows_at_once": {"chunk_rows": None},
    "keeps_activations": {"remat": "none"},
    "neither": {"chunk_rows": None, "remat": "none"},
    "feed_forward": BLOCKS,
    "feed_forward_all_rows_at_once": BLOCKS | {"chunk_rows": None},
}


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    if FLAGS.implementation:
        config = with_model(config, {"implementation": FLAGS.implementation})
    variants = OF_MST if config.model.chunk_rows is not None else OF_ULTRA
    names = FLAGS.variants or list(variants)
    record = Record(FLAGS.record, config=config.name, implementation=config.model.implementation)
    steps = {name: Step(with_model(config, variants[name])) for name in names}
    operations = ("training_TFLOP_a_sample", "encoder_inference_TFLOP_a_sample")
    if FLAGS.count:
        counted = {name: step.operations for name, step in steps.items()}
        record.add(variants=counted)
        show(counted, operations, "variant")
        return
    with ThreadPoolExecutor(len(names)) as pool:  # compilers run side by side
        found = dict(zip(names, pool.map(Step.compile, steps.values()), strict=True))
    for name, step in steps.items():
        if "error" not in found[name]:
            found[name] |= step.measure(FLAGS.seconds)
        record.add(variants=found)
    memory = ("step_ms", "temporary_GiB")
    show(found, (*memory, *operations, "TFLOP_a_second", "error"), "variant")


def with_model(config: Config, changes: Json) -> Config:
    variant = changed(config, model=changes)
    variant.validate()
    return variant


class Step:
    """One variant's training step."""

    def __init__(self, config: Config):
        self.config, items = config, config.data.synthetic.items
        self.program = Program(config, items, jax.devices())
        self.counted = flops.count(config, config.data.max_history, items=items)

    @property
    def operations(self) -> Json:
        """Those that the model needs, and what of it."""
        pieces = (*WHOLE, *CAUSAL, *BLOCKS, "remat", "projection", "preset", "chunk_rows")
        counted = self.counted
        return {
            "model": {name: getattr(self.config.model, name) for name in pieces},
            "training_TFLOP_a_sample": counted.training / 1e12,
            "recomputed_TFLOP_a_sample": counted.recomputed / 1e12,
            "encoder_inference_TFLOP_a_sample": (counted.projections + counted.attention) / 1e12,
        }

    def compile(self) -> Json:
        """What the compiler says of the step's memory, and what it should compute.

        An error is part of the result: another variant may still run.
        """
        started = time.perf_counter()
        try:
            memory = self.program.compile().memory
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000]}
        return self.operations | {
            "fp8_matrix_products": self.program.text.count(
                'custom_call_target="__cublas$lt$matmul$f8"'
            ),
            "compile_s": time.perf_counter() - started,
            "temporary_GiB": memory.temp_size_in_bytes / 2**30 if memory else None,
            "state_GiB": memory.argument_size_in_bytes / 2**30 if memory else None,
        }

    def measure(self, seconds: float) -> Json:
        samples, loss = self.program.sample(5, seconds / 5)
        per_step, data = statistics.median(samples), self.config.data
        work = (self.counted.training - self.counted.recomputed) * data.batch_users
        return {
            "step_ms": 1e3 * per_step,
            "samples_ms": [1e3 * sample for sample in samples],
            "events_a_second": data.batch_users * data.max_history / per_step,
            "TFLOP_a_second": work / per_step / 1e12,
            "loss": loss,
        }


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_list("variants", None, "names of variants; all by default")
    flags.DEFINE_string(
        "implementation", None, "of attention; that of the configuration by default"
    )
    flags.DEFINE_bool("count", False, "count operations, and run nothing")
    flags.DEFINE_float("seconds", 1.0, "time to measure a variant for")
    command.define_record()
    command.run(main)
