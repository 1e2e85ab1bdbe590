"""Load of data-parallel ranks under plain and load-balanced stochastic length: its spread, and the step time of the slowest rank.

python -m scripts.bench.load_balance [--raw_dir=PATH] [--record=experiments/results/load_balance_cpu.json] [--figure=docs/figures/load_balance.png]
python -m scripts.bench.load_balance --draw=RECORD --figure=PICTURE

Two sets of lengths: ASSISTments 2017, and a Zipf law (exponent 1.2, up to 4096). A rank draws its users at random every step. The load is the sum of
length^gamma, gamma fitted to the model's own operations. Times are of real forward and backward passes over each rank's batch, one after another on
this machine, as processor time over all cores, the smaller of two repetitions: other work on the machine would show in wall clock.
"""

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from rich.progress import track
from rich.table import Table

from experiments import command
from ultra_hstu import flops, provenance, report, workdir
from ultra_hstu.config import Config, DataConfig, ModelConfig
from ultra_hstu.data.feed import ROW_MULTIPLE
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sampling import LoadBalancer, stochastic_length
from ultra_hstu.sequences import Sequences

FLAGS = flags.FLAGS
ALPHA, USERS, STEPS, RECALIBRATE, TIMED_RANKS = 1.6, 32, 200, 50, 8
MODEL = ModelConfig(width=32, layers=2, heads=1, qk_width=32, v_width=32, relative_bias=False)
ZIPF_LENGTH, ZIPF_EXPONENT = 4096, 1.2
POLICIES = ("plain", "balanced")


def main(_: list[str]) -> None:
    if FLAGS.draw:
        draw(json.loads(Path(FLAGS.draw).read_text()), Path(str(FLAGS.figure)))
        return
    result: dict[str, Any] = {
        **provenance.provenance(),
        "settings": {
            "alpha": ALPHA,
            "users_per_rank": USERS,
            "steps": STEPS,
            "recalibrate_every": RECALIBRATE,
        },
        "model": {
            "width": MODEL.width,
            "layers": MODEL.layers,
            "heads": MODEL.heads,
            "qk_width": MODEL.qk_width,
            "v_width": MODEL.v_width,
        },
        "sets": {
            name: measure(length_U, FLAGS.timed_steps) for name, length_U in length_sets().items()
        },
    }
    console = report.make_console()
    table = Table("lengths", "ranks", "policy", "load max / mean", "load std / mean", "mean load")
    for name, record in result["sets"].items():
        for ranks, policies in record["load"].items():
            for policy in POLICIES:
                row = policies[policy]
                table.add_row(
                    name,
                    ranks,
                    policy,
                    f"{row['max_over_mean']:.3f}",
                    f"{row['std_over_mean']:.3f}",
                    f"{row['mean']:.3g}",
                )
    console.print(table)
    table = Table(
        "lengths", "policy", "rows of the buffer", "slowest rank, s", "predicted, s", "mean rank, s"
    )
    for name, record in result["sets"].items():
        for policy in POLICIES:
            row = record["step"][policy]
            table.add_row(
                name,
                policy,
                str(row["rows"]),
                *(f"{row[key]:.3f}" for key in ("slowest", "slowest_predicted", "mean")),
            )
    console.print(table)
    if FLAGS.record:
        workdir.write_json(Path(FLAGS.record), result)
    if FLAGS.figure:
        draw(result, Path(FLAGS.figure))


def length_sets() -> dict[str, np.ndarray]:
    """Lengths of users, one entry each."""
    data = load_interactions(
        DataConfig(source="assistments-2017", raw_dir=FLAGS.raw_dir, data_dir=FLAGS.data_dir)
    )
    place = np.arange(1, ZIPF_LENGTH + 1)
    weight = place**-ZIPF_EXPONENT
    zipf = np.random.default_rng(0).choice(place, 20_000, p=weight / weight.sum())
    return {"ASSISTments 2017": data.lengths, f"Zipf({ZIPF_EXPONENT}) to {ZIPF_LENGTH}": zipf}


def measure(length_U: np.ndarray, timed_steps: int) -> dict[str, Any]:
    longest = int(length_U.max())
    config = Config(data=DataConfig(max_history=longest), model=MODEL)
    gamma, error = flops.cost_exponent(config, longest)
    record: dict[str, Any] = {
        "users": len(length_U),
        "mean_length": float(length_U.mean()),
        "longest": longest,
        "gamma": gamma,
        "gamma_largest_error": error,
        "load": {},
    }
    for ranks in (8, 64):
        length_SRU, kept = simulate(length_U, longest, gamma, ranks)
        record["load"][str(ranks)] = {
            policy: spread(kept_SRU, gamma) for policy, kept_SRU in kept.items()
        }
        if ranks == TIMED_RANKS:
            record["step"] = time_ranks(
                config, {policy: kept_SRU[-timed_steps:] for policy, kept_SRU in kept.items()}
            )
            record["kept_share_of_events"] = {
                policy: float(k[RECALIBRATE:].sum() / length_SRU[RECALIBRATE:].sum())
                for policy, k in kept.items()
            }
    return record


def simulate(
    length_U: np.ndarray, longest: int, gamma: float, ranks: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Kept lengths [S, R, users] of every rank and step. The ranks of one process agree on means as an all-reduce would."""
    rng = np.random.default_rng((1, ranks))
    length_SRU = rng.choice(length_U, (STEPS, ranks, USERS))
    uniform_SRU = rng.random(length_SRU.shape)
    plain_SRU = stochastic_length(length_SRU, longest, ALPHA, uniform_SRU)
    mean_load_S = (plain_SRU.astype(np.float64) ** gamma).sum(2).mean(1)
    means = mean_load_S.reshape(-1, RECALIBRATE).mean(1).tolist()
    balanced_SRU = np.zeros_like(plain_SRU)
    for rank in range(ranks):
        balancer = LoadBalancer(
            longest, ALPHA, gamma, RECALIBRATE, mean=functools.partial(_next_mean, iter(means))
        )
        for step in range(STEPS):
            balanced_SRU[step, rank] = balancer.choose(
                length_SRU[step, rank], uniform_SRU[step, rank]
            )
    return length_SRU, {"plain": plain_SRU, "balanced": balanced_SRU}


def _next_mean(means: Any, own: float) -> float:
    return next(means)


def spread(kept_SRU: np.ndarray, gamma: float) -> dict[str, Any]:
    """Of the load over ranks, the mean over steps after the warm-up; and the loads of all ranks and steps, relative to the mean, in 40 bins."""
    load_SR = (kept_SRU[RECALIBRATE:].astype(np.float64) ** gamma).sum(2)
    mean_S = load_SR.mean(1)
    counts, edges = np.histogram(load_SR / mean_S.mean(), bins=np.linspace(0, 4, 41))
    return {
        "max_over_mean": float((load_SR.max(1) / mean_S).mean()),
        "std_over_mean": float((load_SR.std(1) / mean_S).mean()),
        "mean": float(mean_S.mean()),
        "histogram": {
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "beyond": int((load_SR / mean_S.mean() > 4).sum()),
        },
    }


def time_ranks(config: Config, kept: dict[str, np.ndarray]) -> dict[str, Any]:
    """Processor seconds of a forward and backward pass over the batch of each rank, in a buffer that holds the largest batch of its policy."""
    record: dict[str, Any] = {}
    for policy, kept_SRU in kept.items():
        rows = -(-int(kept_SRU.sum(2).max()) // ROW_MULTIPLE) * ROW_MULTIPLE
        step, params = training_pass(config, rows)
        seconds_SR = np.zeros(kept_SRU.shape[:2])
        flops_SR = np.zeros_like(seconds_SR)
        for place in track(
            list(np.ndindex(seconds_SR.shape)),
            f"{policy:>9}",
            console=report.make_console(),
            transient=True,
        ):
            offsets = jnp.asarray(np.concatenate([[0], np.cumsum(kept_SRU[place])]), jnp.int32)
            flops_SR[place] = USERS * flops.count(config, kept_SRU[place]).training
            seconds_SR[place] = min(processor_seconds(step, params, offsets) for _ in range(2))
        record[policy] = {"rows": rows, "seconds": seconds_SR.tolist(), "flops": flops_SR.tolist()}
    every = [
        np.concatenate([np.ravel(record[policy][key]) for policy in POLICIES])
        for key in ("seconds", "flops")
    ]
    per_flop = float(every[0].sum() / every[1].sum())
    for policy in POLICIES:
        seconds_SR, flops_SR = (np.asarray(record[policy][key]) for key in ("seconds", "flops"))
        record[policy] |= {
            "slowest": float(seconds_SR.max(1).mean()),
            "mean": float(seconds_SR.mean()),
            "slowest_predicted": float(
                flops_SR.max(1).mean() * per_flop
            ),  # by operations, at the mean speed of all batches
        }
    record["correlation_of_seconds_and_flops"] = float(np.corrcoef(np.stack(every))[0, 1])
    return record


def training_pass(config: Config, rows: int) -> tuple[Any, Any]:
    graphdef, params = nnx.split(
        HSTU.from_config(config.model, config.padded_length, rngs=nnx.Rngs(0))
    )
    x_TD = jax.random.normal(jax.random.key(0), (rows, config.model.width))
    zero_T = jnp.zeros(rows, jnp.int32)

    @jax.jit
    def step(params: Any, offsets: jax.Array) -> Any:
        def loss(params: Any, x_TD: jax.Array) -> jax.Array:
            real_T = jnp.arange(rows) < offsets[-1]
            h_TD = nnx.merge(graphdef, params)(x_TD, Sequences(offsets, real_T, zero_T, zero_T))
            return jnp.sum(jnp.where(real_T[:, None], jnp.sin(h_TD), 0.0))

        return jax.grad(loss, argnums=(0, 1))(params, x_TD)

    jax.block_until_ready(step(params, jnp.zeros(USERS + 1, jnp.int32)))
    return step, params


def processor_seconds(step: Any, params: Any, offsets: jax.Array) -> float:
    started = time.process_time()
    jax.block_until_ready(step(params, offsets))
    return time.process_time() - started


def draw(record: dict[str, Any], picture: Path) -> None:
    """Left: how the loads of 64 ranks spread. Right: the step time of each of 8 ranks, forward and backward: ranks sorted by time in every step, then the mean over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"plain": "tab:grey", "balanced": "tab:blue"}
    words = {"plain": "stochastic length", "balanced": "load-balanced"}
    figure, axes = plt.subplots(
        len(record["sets"]), 2, figsize=(9, 5.6), constrained_layout=True, squeeze=False
    )
    for (left, right), (name, values) in zip(axes, record["sets"].items(), strict=True):
        for number, policy in enumerate(POLICIES):
            row = values["load"]["64"][policy]
            edges, counts = (
                np.array(row["histogram"]["edges"]),
                np.array(row["histogram"]["counts"]),
            )
            label = f"{words[policy]}: max / mean {row['max_over_mean']:.2f}"
            left.stairs(
                counts / (counts.sum() + row["histogram"]["beyond"]),
                edges,
                color=colours[policy],
                fill=not number,
                alpha=0.5 + 0.5 * number,
                label=label,
            )
            seconds_R = np.sort(values["step"][policy]["seconds"], axis=1).mean(0)
            right.bar(
                np.arange(len(seconds_R)) + 0.4 * number - 0.2,
                seconds_R,
                0.4,
                color=colours[policy],
                label=f"{words[policy]}: slowest {seconds_R[-1]:.2f} s",
            )
        left.set(
            title=f"{name}, 64 ranks",
            xlabel="load of a rank / mean",
            ylabel="share of ranks and steps",
            xlim=(0, 4),
        )
        right.set(
            title=f"{name}, 8 ranks, mean of steps",
            xlabel="rank, by time",
            ylabel="processor seconds",
        )
        for axis in (left, right):
            axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # room for the legend
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, loc="upper right" if axis is left else "upper left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    flags.DEFINE_string("raw_dir", None, "a local copy of ASSISTments 2017")
    flags.DEFINE_string("data_dir", "data", "prepared files go here")
    flags.DEFINE_string("record", None, "JSON file for the result")
    flags.DEFINE_string("figure", None, "picture drawn from the result")
    flags.DEFINE_string("draw", None, "only draw the picture of this JSON file")
    flags.DEFINE_integer("timed_steps", 2, "steps whose ranks are timed")
    command.run(main)
