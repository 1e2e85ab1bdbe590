"""Load of data-parallel devices under plain and load-balanced stochastic length.

python -m scripts.bench.load_balance [--raw_dir=PATH]
    [--record=experiments/results/load_balance_cpu.json]

Its spread, and the step time of the slowest device. Two sets of lengths: ASSISTments 2017, and a
Zipf law (exponent 1.2, up to 4096). A device draws its users at random every step. The load is the
sum of length^gamma, gamma fitted to the model's own operations. Times are of real forward and
backward passes over each device's batch, one after another on this machine, as processor time over
all cores, the smaller of two repetitions: other work on the machine would show in wall clock.
"""

import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Int
from rich.progress import track

from experiments import command
from experiments.record import Json, Record
from scripts.bench.terminal import show
from ultra_hstu import flops, report
from ultra_hstu.config import Config, DataConfig, ModelConfig
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.data.packing import ROW_MULTIPLE
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sampling import LoadBalancer, keep_probability, stochastic_length
from ultra_hstu.sequences import Sequences

FLAGS = flags.FLAGS
ALPHA, USERS, STEPS, RECALIBRATE, TIMED_DEVICES = 1.6, 32, 200, 50, 8
MODEL = ModelConfig(width=32, layers=2, heads=1, qk_width=32, v_width=32, relative_bias=False)
ZIPF_LENGTH, ZIPF_EXPONENT = 4096, 1.2
POLICIES = ("plain", "balanced")
Pass = Callable[[nnx.State, jax.Array], tuple[nnx.State, jax.Array]]


def main(_: list[str]) -> None:
    record = Record(
        FLAGS.record,
        settings={
            "alpha": ALPHA,
            "users_per_rank": USERS,
            "steps": STEPS,
            "recalibrate_every": RECALIBRATE,
        },
        model={
            name: getattr(MODEL, name)
            for name in ("width", "layers", "heads", "qk_width", "v_width")
        },
    )
    sets = {name: measure(length_U, FLAGS.timed_steps) for name, length_U in length_sets().items()}
    for name, found in sets.items():
        loads = {
            f"{devices} devices, {policy}": found["load"][devices][policy]
            for devices in found["load"]
            for policy in POLICIES
        }
        show(loads, ("max_over_mean", "std_over_mean", "mean"), f"load: {name}")
        steps = {policy: found["step"][policy] for policy in POLICIES}
        show(steps, ("rows", "slowest", "slowest_predicted", "mean"), f"seconds: {name}")
    record.add(sets=sets)


def length_sets() -> dict[str, Int[np.ndarray, " U"]]:
    """Lengths of users, one entry each."""
    data = load_interactions(
        DataConfig(source="assistments-2017", raw_dir=FLAGS.raw_dir, data_dir=FLAGS.data_dir)
    )
    place = np.arange(1, ZIPF_LENGTH + 1)
    weight = place**-ZIPF_EXPONENT
    zipf = np.random.default_rng(0).choice(place, 20_000, p=weight / weight.sum())
    return {"ASSISTments 2017": data.lengths, f"Zipf({ZIPF_EXPONENT}) to {ZIPF_LENGTH}": zipf}


def measure(length_U: Int[np.ndarray, " U"], timed_steps: int) -> Json:
    longest = int(length_U.max())
    config = Config(data=DataConfig(max_history=longest), model=MODEL)
    gamma, error = flops.cost_exponent(config, longest)
    record: Json = {
        "users": len(length_U),
        "mean_length": float(length_U.mean()),
        "longest": longest,
        "gamma": gamma,
        "gamma_largest_error": error,
        "load": {},
    }
    for devices in (8, 64):
        length_SRU, kept = simulate(length_U, longest, gamma, devices)
        record["load"][str(devices)] = {
            policy: spread(kept_SRU, gamma) for policy, kept_SRU in kept.items()
        }
        if devices == TIMED_DEVICES:
            record["step"] = time_devices(
                config, {policy: kept_SRU[-timed_steps:] for policy, kept_SRU in kept.items()}
            )
            record["kept_share_of_events"] = {
                policy: float(k[RECALIBRATE:].sum() / length_SRU[RECALIBRATE:].sum())
                for policy, k in kept.items()
            }
    record["longest_sixth_whole"] = longest_sixth(length_SRU, kept, longest)  # of most devices
    return record


def simulate(
    length_U: Int[np.ndarray, " U"], longest: int, gamma: float, devices: int
) -> tuple[Int[np.ndarray, "S R U"], dict[str, Int[np.ndarray, "S R U"]]]:
    """(lengths, kept lengths by policy) of every step, device and user.

    The devices of this process agree on means as an all-reduce would.
    """
    rng = np.random.default_rng((1, devices))
    length_SRU = rng.choice(length_U, (STEPS, devices, USERS))
    uniform_SRU = rng.random(length_SRU.shape)
    plain_SRU = stochastic_length(length_SRU, longest, ALPHA, uniform_SRU)
    mean_load_S = (plain_SRU.astype(np.float64) ** gamma).sum(2).mean(1)
    means = mean_load_S.reshape(-1, RECALIBRATE).mean(1).tolist()
    balanced_SRU = np.zeros_like(plain_SRU)
    for device in range(devices):
        balancer = LoadBalancer(
            longest, ALPHA, gamma, RECALIBRATE, mean=functools.partial(_next_mean, iter(means))
        )
        for step in range(STEPS):
            balanced_SRU[step, device] = balancer.choose(
                length_SRU[step, device], uniform_SRU[step, device]
            )
    return length_SRU, {"plain": plain_SRU, "balanced": balanced_SRU}


def longest_sixth(
    length_SRU: Int[np.ndarray, "S R U"], kept: dict[str, Int[np.ndarray, "S R U"]], longest: int
) -> dict[str, float]:
    """How often histories of the longest sixth stay whole: by the law, and by each policy.

    They are those of more than 5 / 6 of the longest length.
    """
    lengths = length_SRU[RECALIBRATE:]
    long = lengths > longest * 5 / 6
    law = np.minimum(keep_probability(lengths[long], longest, ALPHA), 1).mean()
    shares = {
        policy: float((kept_SRU[RECALIBRATE:] == lengths)[long].mean())
        for policy, kept_SRU in kept.items()
    }
    return {"law": float(law)} | shares


def _next_mean(means: Iterator[float], own: float) -> float:
    return next(means)


def spread(kept_SRU: Int[np.ndarray, "S R U"], gamma: float) -> Json:
    """How the load spreads over devices: means over steps after the warm-up, and a histogram.

    That has the loads of all devices and steps, relative to the mean, in 40 bins.
    """
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


def time_devices(config: Config, kept: dict[str, Int[np.ndarray, "S R U"]]) -> Json:
    """Processor seconds of a forward and backward pass over the batch of each device.

    Its buffer holds the largest batch of its policy.
    """
    record: Json = {}
    for policy, kept_SRU in kept.items():
        rows = -(-int(kept_SRU.sum(2).max()) // ROW_MULTIPLE) * ROW_MULTIPLE
        step, params = training_pass(config, rows)
        seconds_SR = np.zeros(kept_SRU.shape[:2])
        flops_SR = np.zeros_like(seconds_SR)
        places, console = list(np.ndindex(seconds_SR.shape)), report.make_console()
        for place in track(places, f"{policy:>9}", console=console, transient=True):
            offsets = jnp.asarray(np.concatenate([[0], np.cumsum(kept_SRU[place])]), jnp.int32)
            flops_SR[place] = USERS * flops.count(config, kept_SRU[place]).training
            seconds_SR[place] = min(seconds(step, params, offsets) for _ in range(2))
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
            # by operations, at the mean speed of all batches
            "slowest_predicted": float(flops_SR.max(1).mean() * per_flop),
        }
    record["correlation_of_seconds_and_flops"] = float(np.corrcoef(np.stack(every))[0, 1])
    return record


def training_pass(config: Config, rows: int) -> tuple[Pass, nnx.State]:
    """A compiled forward and backward pass over a buffer of so many rows, and parameters."""
    graphdef, params = nnx.split(
        HSTU.from_config(config.model, config.padded_length, rngs=nnx.Rngs(0))
    )
    x_TD = jax.random.normal(jax.random.key(0), (rows, config.model.width))
    x_TD = x_TD.astype(config.model.dtype)
    zero_T = jnp.zeros(rows, jnp.int32)

    @jax.jit
    def step(params: nnx.State, offsets: jax.Array) -> tuple[nnx.State, jax.Array]:
        def loss(params: nnx.State, x_TD: jax.Array) -> jax.Array:
            real_T = jnp.arange(rows) < offsets[-1]
            h_TD = nnx.merge(graphdef, params)(x_TD, Sequences(offsets, real_T, zero_T, zero_T))
            return jnp.sum(jnp.where(real_T[:, None], jnp.sin(h_TD), 0.0))

        return jax.grad(loss, argnums=(0, 1))(params, x_TD)

    jax.block_until_ready(step(params, jnp.zeros(USERS + 1, jnp.int32)))
    return step, params


def seconds(
    step: Pass,
    params: nnx.State,
    offsets: jax.Array,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Of a pass, by the clock; those of the processor are not lengthened by other work."""
    started = clock()
    jax.block_until_ready(step(params, offsets))
    return clock() - started


if __name__ == "__main__":
    flags.DEFINE_string("raw_dir", None, "a local copy of ASSISTments 2017")
    flags.DEFINE_string("data_dir", None, "prepared files go here, if not to the user's folder")
    flags.DEFINE_integer("timed_steps", 2, "steps whose devices are timed")
    command.define_record()
    command.run(main)
