"""How the devices of a context group come by their batch: all of it, or users of their own.

    # four CPU processes, within 4 minutes of two cores
    python -m scripts.bench.batches --processes=4 --record=experiments/results/batches_cpu.json
    # two GPUs of a host, within 6 minutes: the training step, too
    python -m scripts.bench.batches --processes=2 --device=gpu --step \
        --record=experiments/results/batches_h200.json
    # tiny, one process
    python -m scripts.bench.batches --small

`parallel.batches` is replicated (each device makes the whole batch), gathered (each reads its own
users, all-gather, then its rows are cut out: the baseline of arXiv 2508.04711) or exchanged (each
reads its own users, all-to-all). Two batches: narrow, ids and times of retrieval; wide, a ranking
batch of 4 signals and 16 features. What is measured ends with the rows of a batch that a device
works on, as the model takes them; with `--step` a training step of streamed batches as well. Ways
take turns; batches a second is the median of the rounds, processor time that of all processes.
Memory and bytes are the compiler's counts, of one batch on one device.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from experiments import command
from experiments.record import Json, Record
from scripts.bench import launch
from scripts.bench.program import temporaries
from scripts.bench.terminal import show
from ultra_hstu import tasks
from ultra_hstu.config import Config, DataConfig, ModelConfig, RankConfig, TrainConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.feed import (
    DeviceFeed,
    Feed,
    Fixed,
    Loader,
    SharedFeed,
    StreamedFeed,
    feed_specs,
)
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.fields import changed
from ultra_hstu.parallel import processes
from ultra_hstu.parallel.collectives import bytes_sent
from ultra_hstu.parallel.mesh import CONTEXT, DATA
from ultra_hstu.task import Task

FLAGS = flags.FLAGS
WAYS: tuple[Literal["replicated", "gathered", "exchanged"], ...] = (
    "replicated",
    "gathered",
    "exchanged",
)
PLACEMENTS: tuple[Literal["stream", "device"], ...] = ("stream", "device")
ITEMS, FEATURES, STEPS_PER_CALL = 20_000, 16, 4
SIGNALS = ("is_click", "is_like", "is_follow", "rating")
Run = Callable[[Feed, np.int32], PyTree]


def main(_: list[str]) -> None:
    launch.in_processes(measure_all)


def measure_all() -> None:
    users, longest = (8, 32) if FLAGS.small else (FLAGS.users, FLAGS.longest)
    record = Record(
        FLAGS.record if processes.is_first() else None,
        processes=jax.process_count(),
        devices=jax.device_count(),
        users=users,
        longest=longest,
        machine="shared with other work" if FLAGS.shared else "alone",
    )
    data = interactions(users, longest)
    rounds, calls = (1, 1) if FLAGS.small else (FLAGS.rounds, FLAGS.calls)
    found: dict[str, Json] = {}
    width = 512 if launch.on_gpu() and not FLAGS.small else 16
    for case, config in cases(users, longest, width).items():
        for placement in PLACEMENTS:
            placed = changed(config, data={"placement": placement})
            found[f"{case}, {placement}"] = measure(placed, data, rounds, calls)
            record.add(rows=config.data.batch_tokens, batches=found)
        if FLAGS.step:
            streamed = changed(config, data={"placement": "stream"})
            step = measure(streamed, data, rounds, calls, whole_step=True)
            record.add(steps=record.values.get("steps", {}) | {case: step})
    if processes.is_first():
        for name, ways in found.items():
            show(ways, ("batches_a_second", "put_bytes", "temporary_bytes", "bytes_sent"), name)


def interactions(users: int, longest: int) -> Interactions:
    """Ten batches of users, whose lengths are lognormal, up to the longest."""
    rng = np.random.default_rng(0)
    length_U = np.clip(rng.lognormal(np.log(longest / 3), 0.8, 10 * users), 8, longest).astype(int)
    events = int(length_U.sum())
    features = tuple(f"f{number}" for number in range(FEATURES))
    return Interactions(
        users=np.arange(len(length_U)),
        items=rng.integers(1, ITEMS + 1, events).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(length_U)]),
        timestamps=np.sort(rng.integers(0, 10**7, events)),
        actions={name: rng.integers(0, 2, events).astype(np.int32) for name in SIGNALS}
        | {"rating": rng.integers(1, 6, events).astype(np.float32)}
        | {name: rng.integers(0, 30, events).astype(np.int32) for name in features},
        catalog=Catalog.from_ids(np.arange(1, ITEMS + 1)),
        features=features,
    )


def cases(users: int, longest: int, width: int) -> dict[str, Config]:
    """The two configurations, of a model of this width."""
    narrow = Config(
        name="narrow",
        data=DataConfig(
            max_history=longest,
            batch_users=users,
            # Most batches end for want of users.
            batch_tokens=users * longest // 2,
        ),
        model=ModelConfig(
            width=width,
            layers=4 if width > 16 else 1,
            heads=4,
            qk_width=width // 4,
            v_width=width // 4,
            relative_bias=False,
            window=(min(256, longest // 4),),
            output_slots=0,
        ),
        train=TrainConfig(steps_per_call=STEPS_PER_CALL),
    )
    features = tuple(f"f{number}" for number in range(FEATURES))
    wide = dataclasses.replace(
        narrow,
        name="wide",
        rank=RankConfig(tasks=("is_click", "is_like"), signals=SIGNALS, features=features),
        train=TrainConfig(protocol="chronological", steps_per_call=STEPS_PER_CALL),
    )
    return {"narrow": narrow, "wide": wide}


def measure(
    config: Config, data: Interactions, rounds: int, calls: int, *, whole_step: bool = False
) -> Json:
    """What each way takes, one beside the other."""
    made: dict[str, tuple[Loader, Run]] = {}
    found: dict[str, Json] = {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_seconds: dict[str, float] = dict.fromkeys(WAYS, 0.0)
    devices = jax.device_count()
    for way in WAYS:
        task = tasks.of(changed(config, parallel={"context": devices, "batches": way}), data)
        loader = task.loader(
            "train", batch_users=config.data.batch_users, steps_per_call=STEPS_PER_CALL
        )
        feed = next(iter(loader.groups(loader.plan()))).feed
        assert not isinstance(feed, Fixed)  # that is what no loader gives
        run, program = compiled(task, feed, whole_step)
        made[way] = loader, run
        found[way] = {
            "put_bytes": put_bytes(feed),
            "packed_rows": packed_rows(loader),
            "temporary_bytes": temporaries(program),
            "bytes_sent": bytes_sent(program.as_text() or "", devices),
        }
    for number in range(rounds + 1):
        for name, (loader, run) in made.items():
            processes.barrier()
            started, cpu_started = time.perf_counter(), time.process_time()
            batches = pass_over(loader, run, calls)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
            if number:  # the first warms up
                seconds[name].append(elapsed / batches)
                cpu_seconds[name] += sum(processes.all_gather(cpu)) / batches / rounds
    for name, values in found.items():
        values |= {
            "batches_a_second": 1 / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "processor_seconds": cpu_seconds[name],
        }
    return found


def compiled(task: Task, feed: Feed, whole_step: bool) -> tuple[Run, jax.stages.Compiled]:
    """What is run for each batch, and its program."""
    recipe, everywhere = task.recipe, PartitionSpec()
    if whole_step:
        state = recipe.start(0)
        step = jax.jit(recipe.feed_step).lower(state, feed, np.int32(0)).compile()
        return lambda feed, number: step(state, feed, number)[1], step

    def rows(feed: Feed, number: jax.Array) -> list[jax.Array]:
        batch = feed.batch(number)
        parts = batch.channels.values() if task.config.rank.tasks else [batch]
        by_rows = [[getattr(part, name) for name in vars(part) if "_T" in name] for part in parts]
        return jax.tree.leaves(recipe.shards.local(by_rows))

    mapped = recipe.over_devices(
        rows, (feed_specs(feed), everywhere), PartitionSpec((DATA, CONTEXT))
    )
    program = jax.jit(mapped).lower(feed, np.int32(0)).compile()
    return program, program


def pass_over(loader: Loader, run: Run, calls: int) -> int:
    """Runs the batches of so many calls; returns how many they were."""
    batches, results = 0, None
    with contextlib.closing(loader.groups(loader.plan())) as groups:  # type: ignore[type-var]
        for _, group in zip(range(calls), groups, strict=False):
            for step in range(group.steps):
                results = run(group.feed, np.int32(step))
            batches += group.steps
    jax.block_until_ready(results)
    return batches


def put_bytes(feed: DeviceFeed | StreamedFeed | SharedFeed) -> float:
    """Bytes of a batch that reach a device from its host, without the data that lives there."""
    own = feed.own if isinstance(feed, SharedFeed) else feed
    arrays: PyTree = own.columns_SB if isinstance(own, DeviceFeed) else own.batches_S
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(arrays)]
    return sum(shard.nbytes for shard in shards) / STEPS_PER_CALL


def packed_rows(loader: Loader) -> int:
    """Rows, of all buffers, that this process or its device makes for each of its devices."""
    return int(np.sum(loader.own_gather.rows))


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "tiny batches, one round")
    flags.DEFINE_bool("step", False, "measures the training step as well")
    flags.DEFINE_bool("shared", False, "says in the record that other work ran beside")
    flags.DEFINE_integer("users", 64, "histories of a batch")
    flags.DEFINE_integer("longest", 1024, "events of the longest")
    flags.DEFINE_integer("rounds", 3, "in which the ways take turns")
    flags.DEFINE_integer("calls", 3, "of 4 batches, in a round")
    flags.DEFINE_integer("processes", 1, "so many of this host, one device each")
    flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "which devices they have")
    command.define_record()
    command.run(main)
