"""How the best items of a mixture of logits are found: time, proofs, and recall of candidates.

python -m scripts.bench.mol_top_k [--items=3883,20000] [--users=4] [--seconds=1]
    [--record=experiments/results/NAME.json]

8 x 4 components of width 64, made of random vectors by a mixture as it is initialised (`spread`:
weights have little to do with the logits) and by one whose gate follows the logits (`few`: most of
the weight is on the largest ones). A trained mixture lies between. Proven is the share of the users
whose best items the highest bounds prove; `exact` scores all items unless they prove all users of a
call. Recall is that of the 10 and 100 best items among what a number of candidates finds. A time
is the least of several calls; on a CPU others may share the cores.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import command
from experiments.record import Json, Record
from scripts.bench.terminal import show
from ultra_hstu.retrieval.metrics import Best
from ultra_hstu.retrieval.mol import ItemPart, MixtureOfLogits
from ultra_hstu.retrieval.mol_scores import ROUNDS, Answering, best, item_part, proved
from ultra_hstu.sections import MolConfig

FLAGS = flags.FLAGS
WIDTH, TEMPERATURE, SHARPNESS = 50, 0.05, 1.0
CANDIDATES = (256, 1024)
KS = (10, 100)


def main(_: list[str]) -> None:
    record = Record(FLAGS.record, users=FLAGS.users, **MolConfig().__dict__)
    shown: dict[str, Json] = {}
    for items in map(int, FLAGS.items):
        for weights in ("spread", "few"):
            found = measured(mixture(weights), items, FLAGS.users)
            name = f"{items} {weights}"
            record.add(**{name: found})
            shown |= {f"{name} {how}": values for how, values in found.items()}
    show(shown, ("ms", "proven@10", "proven@100", "recall@10", "recall@100"), "best items")


def mixture(weights: str) -> MixtureOfLogits:
    made = MixtureOfLogits(
        MolConfig(), WIDTH, temperature=TEMPERATURE, l2_normalize=True, rngs=nnx.Rngs(0)
    )
    if weights == "few":  # the gate's net of the logits hands them on
        logits, gate = made.cross_gate.hidden.shape
        made.cross_gate.hidden[...] = jnp.eye(logits, gate) * SHARPNESS
        made.cross_gate.output[...] = jnp.eye(gate, logits)
    return made


def measured(made: MixtureOfLogits, items: int, users: int) -> dict[str, Json]:
    """Of every way to find the best items of random users."""
    rng = np.random.default_rng(0)
    table_ID = jnp.asarray(rng.normal(size=(items + 1, WIDTH)), jnp.float32)
    vector_UD = jnp.asarray(rng.normal(size=(users, WIDTH)), jnp.float32)
    parts = jax.jit(functools.partial(item_part, made))(table_ID)
    given = jax.jit(functools.partial(Answering.of, made))(vector_UD), parts

    def run(
        k: int, candidates: int | None = None, rounds: tuple[int, ...] = ()
    ) -> tuple[Best, float]:
        def call(users: Answering, items: ItemPart) -> Best:
            return best(users, items, k=k, candidates=candidates, rounds=rounds)

        return timed(jax.jit(call), *given)

    (want_UK, _), seconds = run(max(KS))
    found: dict[str, Json] = {"all items": {"ms": 1e3 * seconds}}
    for count in (count for count in ROUNDS if count < items):
        proofs = {
            f"proven@{k}": float(
                np.mean(jax.jit(functools.partial(proved, k=k, count=count))(*given)[1])
            )
            for k in KS
        }
        found[f"{count} bounds"] = proofs
    found["exact"] = {"ms": 1e3 * run(KS[0], rounds=ROUNDS)[1]}
    for count in (count for count in CANDIDATES if count < items):
        (got_UK, _), seconds = run(max(KS), count)
        recalls = {f"recall@{k}": recall(got_UK[:, :k], want_UK[:, :k]) for k in KS}
        found[f"{count} candidates"] = {"ms": 1e3 * seconds, **recalls}
    return found


def recall(got_UK: jax.Array, want_UK: jax.Array) -> float:
    pairs = zip(np.asarray(got_UK), np.asarray(want_UK), strict=True)
    return float(np.mean([np.isin(want_K, got_K).mean() for got_K, want_K in pairs]))


def timed(
    run: Callable[[Answering, ItemPart], Best], users: Answering, items: ItemPart
) -> tuple[Best, float]:
    """What a call gives, and the least of its times in seconds."""
    found = jax.block_until_ready(run(users, items))
    least, until = float("inf"), time.perf_counter() + FLAGS.seconds
    while least == float("inf") or time.perf_counter() < until:
        started = time.perf_counter()
        jax.block_until_ready(run(users, items))
        least = min(least, time.perf_counter() - started)
    return found, least


if __name__ == "__main__":
    flags.DEFINE_list("items", ["3883", "20000"], "sizes of the catalogue")
    flags.DEFINE_integer("users", 4, "of a call")
    flags.DEFINE_float("seconds", 1.0, "time to measure a way for")
    command.define_record()
    command.run(main)
