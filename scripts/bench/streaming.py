"""Times training steps on data of ML-20M's size, by where its events lie.

python -m scripts.bench.streaming --config=ml1m_hstu [--users=138493] [--events=20000263]
    [--folder=DIR] [--record=experiments/results/NAME.json]

The data is generated: as many users, items and events as MovieLens-20M has, and histories as
uneven. Its events lie on the device, in the host's memory (`stream`) or in shards on the disk, and
these take turns, so that what else the machine does hits all alike. A turn is some calls of
`train.steps_per_call` steps in a row, of which the first are not timed: their batches were made
before.
Waiting is the share of the time in which the next batches were awaited. Speeds are compared by the
fastest calls, which other work on the machine disturbs least; on a CPU by what its cores compute.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from rich.progress import track

from experiments import command
from experiments.record import Json, Record
from scripts.bench.step import Timed
from scripts.bench.terminal import show
from ultra_hstu import report, tasks
from ultra_hstu.config import from_config_dict
from ultra_hstu.data import shards
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.fields import changed

FLAGS = flags.FLAGS
PLACEMENTS = ("device", "stream", "shards")
ITEMS = 26_744  # of MovieLens-20M that were rated
FEWEST = 20  # events of a user of MovieLens
BLOCK = 8192  # users written at one time


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    record = Record(FLAGS.record, config=config.name, steps_per_call=config.train.steps_per_call)
    folder = Path(FLAGS.folder or tempfile.mkdtemp())
    whole = generated(FLAGS.users, FLAGS.events)
    started = time.perf_counter()
    on_disk = shards.open_or_write(folder / f"shards-{whole.num_events}", lambda: blocks(whole))
    written: Json = {
        "users": whole.num_users,
        "items": whole.num_items,
        "events": whole.num_events,
        "events_MiB": whole.num_events * on_disk.dtype.itemsize / 2**20,
        "shards_MiB": sum(path.stat().st_size for path in on_disk.folder.iterdir()) / 2**20,
        "write_seconds": time.perf_counter() - started,
    }
    record.add(data=written)
    with jax.default_matmul_precision(config.train.matmul_precision):
        steps = {
            name: Timed(
                tasks.of(
                    changed(config, data={"placement": name}),
                    on_disk if name == "shards" else whole,
                )
            )
            for name in PLACEMENTS
        }
        turns = list(range(FLAGS.turns))
        for _turn in track(turns, "turns", console=report.make_console(), transient=True):
            for one in steps.values():
                one.turn(FLAGS.repeats)
    found = {name: one.result() for name, one in steps.items()}
    # On a CPU a step takes what the cores compute for it, whatever else the machine does.
    measure = "host_ms" if jax.default_backend() == "cpu" else "step_ms_min"
    for values in found.values():
        values["of_device"] = found["device"][measure] / values[measure]
    show(found, ("step_ms_median", "step_ms_min", "of_device", "input_wait_share"), config.name)
    record.add(placements=found)


def generated(users: int, events: int) -> Interactions:
    """Users whose numbers of events are about log-normal, with items by a power law."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0.0, 1.3, users)
    more = share * (events - FEWEST * users) / share.sum()
    lengths = FEWEST + more.astype(np.int64)
    count = int(lengths.sum())
    return Interactions(
        users=np.arange(1, users + 1),
        items=(ITEMS * rng.random(count) ** 3).astype(np.int32) + 1,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        timestamps=10**9 + np.arange(count),  # ascending, whoever the user is
        actions={},
        catalog=Catalog(np.arange(ITEMS + 1)),
    )


def blocks(whole: Interactions) -> Iterator[Interactions]:
    """The users, some thousand at a time."""
    edges = [*range(0, whole.num_users, BLOCK), whole.num_users]
    for first, last in itertools.pairwise(edges):
        bounds = whole.offsets[first : last + 1]
        span = slice(bounds[0], bounds[-1])
        times = None if whole.timestamps is None else whole.timestamps[span]
        yield Interactions(
            users=whole.users[first:last],
            items=whole.items[span],
            offsets=bounds - bounds[0],
            timestamps=times,
            actions={},
            catalog=whole.catalog,
        )


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("users", 138_493, "users of the generated data")
    flags.DEFINE_integer("events", 20_000_263, "their events, about")
    flags.DEFINE_integer("turns", 3, "turns of each placement")
    flags.DEFINE_integer("repeats", 8, "calls of a turn that are timed")
    command.as_path(flags.DEFINE_string("folder", None, "for the shards; by default a new one"))
    command.define_record()
    command.run(main)
