"""Step times of data-parallel ranks under plain and load-balanced stochastic length.

    # four CPU processes, within 3 minutes of two cores
    python -m scripts.bench.load_balance_ranks --processes=4 [--raw_dir=PATH] \
        --record=experiments/results/load_balance_ranks_cpu.json
    # two GPUs of a host, within 3 minutes
    python -m scripts.bench.load_balance_ranks --processes=2 --device=gpu [--raw_dir=PATH] \
        --record=experiments/results/load_balance_ranks_h200.json

Each process is a rank with users of its own, drawn as in `load_balance`, and computes forward and
backward passes over its own batches. All wait for the slowest: its seconds are those of a step.
`alone` are the seconds of a rank's pass with nothing between the ranks (on CPU processor time,
which other work on the machine does not lengthen); `together` is the wall clock of a step that ends
with the sum of all gradients.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from experiments import command
from experiments.record import Json, Record
from scripts.bench import launch
from scripts.bench import load_balance as draws
from scripts.bench.terminal import show
from ultra_hstu import flops
from ultra_hstu.config import Config, DataConfig, ModelConfig
from ultra_hstu.data.packing import ROW_MULTIPLE
from ultra_hstu.parallel import processes
from ultra_hstu.parallel.mesh import DATA, make_mesh, put

FLAGS = flags.FLAGS
GPU_MODEL = ModelConfig(
    width=512,
    layers=8,
    heads=4,
    qk_width=128,
    v_width=128,
    relative_bias=False,
    dtype="bfloat16",
)


def main(_: list[str]) -> None:
    launch.in_processes(measure_all)


def measure_all() -> None:
    model = GPU_MODEL if launch.on_gpu() else draws.MODEL
    record = Record(
        FLAGS.record if processes.is_first() else None,
        ranks=jax.process_count(),
        users_per_rank=draws.USERS,
        alpha=draws.ALPHA,
        model={name: getattr(model, name) for name in ("width", "layers", "heads", "dtype")},
        machine="shared with other work" if FLAGS.shared else "alone",
    )
    sets = {
        name: measure(model, length_U, FLAGS.timed_steps)
        for name, length_U in draws.length_sets().items()
    }
    record.add(sets=sets)
    if processes.is_first():
        for name, found in sets.items():
            show(found, ("rows", "slowest", "mean", "slowest_over_mean", "together"), name)


def measure(model: ModelConfig, length_U: Int[np.ndarray, " U"], timed_steps: int) -> Json:
    """Seconds of the timed steps by policy: of each rank, of the slowest, and of the mean."""
    longest, ranks = int(length_U.max()), jax.process_count()
    config = Config(data=DataConfig(max_history=longest), model=model)
    gamma, _ = flops.cost_exponent(config, longest)
    _, kept = draws.simulate(length_U, longest, gamma, ranks)
    mesh, found = make_mesh(data=ranks, devices=jax.devices()[:ranks]), {}
    clock = time.perf_counter if launch.on_gpu() else time.process_time
    for policy, kept_SRU in kept.items():
        kept_SRU = kept_SRU[-timed_steps:]
        rows = -(-int(kept_SRU.sum(2).max()) // ROW_MULTIPLE) * ROW_MULTIPLE
        step, params = draws.training_pass(config, rows)
        offsets_SRB = np.pad(np.cumsum(kept_SRU, axis=2), ((0, 0), (0, 0), (1, 0)))
        offsets_SRB = offsets_SRB.astype(np.int32)
        alone_S = [
            min(draws.seconds(step, params, jnp.asarray(own_B), clock) for _ in range(2))
            for own_B in offsets_SRB[:, jax.process_index()]
        ]
        alone_SR = np.array(processes.all_gather(alone_S)).T
        found[policy] = {
            "rows": rows,
            "gamma": gamma,
            "alone": alone_SR.tolist(),
            "slowest": float(alone_SR.max(1).mean()),
            "mean": float(alone_SR.mean()),
            "slowest_over_mean": float((alone_SR.max(1) / alone_SR.mean(1)).mean()),
            "together": together(step, params, offsets_SRB, mesh),
        }
    return found


def together(
    step: draws.Pass, params: nnx.State, offsets_SRB: Int[np.ndarray, "S R B"], mesh: Mesh
) -> float:
    """The mean wall clock of steps in which the ranks add their gradients up."""

    def summed(params: nnx.State, offsets_1B: Array) -> nnx.State:
        return jax.lax.psum(step(params, offsets_1B[0])[0], DATA)

    everywhere = PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(everywhere, PartitionSpec(DATA)),
            out_specs=everywhere,
            check_vma=False,
        )
    )
    on_mesh = put(params, mesh)
    placed = [put(offsets_RB, mesh, PartitionSpec(DATA)) for offsets_RB in offsets_SRB]
    jax.block_until_ready(run(on_mesh, placed[0]))
    processes.barrier()
    started = time.perf_counter()
    for offsets in placed:
        jax.block_until_ready(run(on_mesh, offsets))
    return (time.perf_counter() - started) / len(placed)


if __name__ == "__main__":
    flags.DEFINE_string("raw_dir", None, "a local copy of ASSISTments 2017")
    flags.DEFINE_string("data_dir", None, "prepared files go here, if not to the user's folder")
    flags.DEFINE_integer("timed_steps", 8, "steps whose ranks are timed")
    flags.DEFINE_bool("shared", False, "says in the record that other work ran beside")
    flags.DEFINE_integer("processes", 1, "so many of this host, one device each")
    flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "which devices they have")
    command.define_record()
    command.run(main)
