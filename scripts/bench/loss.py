"""What the softmax losses cost, forward and backward, by implementation.

python -m scripts.bench.loss [--cases=ml1m,steps] [--implementations=triton,xla]
    [--record=experiments/results/NAME.json]
python -m scripts.bench.loss --cases=ml1m,steps,catalogue --implementations=triton,xla
    --record=experiments/results/loss_h200.json

A call is loss and gradients of outputs and table, with the norms, the temperature and the draws of
the negatives, as in a step. Memory is the compiler's count of temporaries and of the results, which
are the gradients. FLOPs are those of the scores and of both gradients, each once: what a loss
computes twice or in vain is not counted. A large matrix product of the same dtype runs in between.

On a CPU, where others may share the cores, a time is the least of several calls, and the process's
own CPU time stands beside it.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments import command
from experiments.record import Json, Record
from kernels.timing import device_time
from scripts.bench.program import temporaries
from scripts.bench.terminal import show
from ultra_hstu.retrieval import negatives
from ultra_hstu.retrieval.loss import softmax_loss

FLAGS = flags.FLAGS
KINDS = ("sampled", "shared", "full")
ROWS_PER_DRAW = 128  # of shared negatives
PRODUCT = {"cpu": 1024, "gpu": 8192}  # rows, columns and depth of the matrix product


class LossCase(NamedTuple):
    rows: int
    items: int
    width: int
    negatives: int
    dtype: str


CASES = {
    "ml1m": LossCase(18432, 3883, 50, 128, "float32"),  # ml1m_hstu
    "steps": LossCase(262144, 20000, 512, 128, "bfloat16"),  # scripts.bench.context_parallel
    "catalogue": LossCase(65536, 10**6, 512, 128, "bfloat16"),
}


def main(_: list[str]) -> None:
    record = Record(FLAGS.record)
    found: dict[str, Json] = {}
    for name in FLAGS.cases:
        case = CASES[name]
        parts: Json = {**case._asdict(), "product_TFLOP_a_second": product_rate(case.dtype)}
        for kind in FLAGS.kinds:
            for implementation in FLAGS.implementations:
                label = f"{kind} {implementation}"
                parts[label] = measured(case, kind, implementation)
                found[f"{name} {label}"] = parts[label]
                record.add(**{name: parts})
    show(found, ("ms", "cpu_ms", "TFLOP_a_second", "temporary_MiB", "error"), "loss")


def measured(case: LossCase, kind: str, implementation: str) -> Json:
    """Time and memory; an implementation that cannot, or memory that is not there, is a result."""
    scored = case.items if kind == "full" else case.negatives + 1
    flops = 3 * 2.0 * case.rows * scored * case.width
    try:
        run = jax.jit(functools.partial(gradients, case, kind, implementation))
        inputs = jax.jit(functools.partial(arrays, case))()
        compiled = run.lower(*inputs).compile()
        seconds = timed(compiled, *inputs)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {
        **{name: 1e3 * value for name, value in seconds.items()},
        "TFLOP_a_second": flops / seconds["ms"] / 1e12,
        "temporary_MiB": temporaries(compiled) / 2**20,
    }


def arrays(case: LossCase) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Outputs, table, positives, weights and a key a row."""
    of_h, of_table, of_ids, of_rows = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(of_h, (case.rows, case.width)).astype(case.dtype),
        jax.random.normal(of_table, (case.items + 1, case.width)),
        jax.random.randint(of_ids, (case.rows,), 1, case.items + 1, jnp.int32),
        jnp.ones(case.rows),
        jax.random.split(of_rows, case.rows),
    )


def gradients(
    case: LossCase,
    kind: str,
    implementation: str,
    h_TD: jax.Array,
    table_ID: jax.Array,
    positive_T: jax.Array,
    weight_T: jax.Array,
    key_T: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, and its gradients for outputs and table."""
    together = ROWS_PER_DRAW if kind == "shared" else 1
    drawn = negatives.drawn_uniformly(key_T, case.negatives, case.items, rows_per_draw=together)

    def loss(h_TD: jax.Array, table_ID: jax.Array) -> jax.Array:
        return softmax_loss(
            h_TD,
            table_ID,
            positive_T,
            weight_T,
            None if kind == "full" else drawn,
            temperature=0.05,
            l2_normalize=True,
            chunk_rows=FLAGS.chunk_rows,
            implementation=implementation,
        )[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(h_TD, table_ID)


def timed(run: Callable[..., object], *inputs: jax.Array) -> dict[str, float]:
    """Seconds of a call, `ms`; on a CPU, the process's CPU seconds too, `cpu_ms`."""
    if jax.default_backend() != "cpu":
        timing = device_time(run, *inputs, repetitions=5, sample_seconds=FLAGS.seconds / 5)
        return {"ms": timing.seconds}
    jax.block_until_ready(run(*inputs))
    best = {"ms": float("inf"), "cpu_ms": float("inf")}
    until = time.perf_counter() + FLAGS.seconds
    while time.perf_counter() < until or best["ms"] == float("inf"):
        started, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(*inputs))
        spent = {"ms": time.perf_counter() - started, "cpu_ms": time.process_time() - cpu}
        best = {name: min(value, spent[name]) for name, value in best.items()}
    return best


def product_rate(dtype: str) -> float:
    """TFLOP/s of a large matrix product."""
    size = PRODUCT.get(jax.default_backend(), 1024)
    x = jnp.ones((size, size), dtype)
    seconds = timed(jax.jit(jnp.matmul), x, x)["ms"]
    return 2.0 * size**3 / seconds / 1e12


if __name__ == "__main__":
    flags.DEFINE_list("cases", ["ml1m"], f"some of {', '.join(CASES)}")
    flags.DEFINE_list(
        "kinds", list(KINDS), f"losses; of shared, {ROWS_PER_DRAW} rows have the same"
    )
    flags.DEFINE_list("implementations", ["xla"], "of the ops, by name")
    flags.DEFINE_integer("chunk_rows", None, "loss.chunk_rows")
    flags.DEFINE_float("seconds", 1.0, "time to measure a loss for")
    command.define_record()
    command.run(main)
