"""One of the processes of tests/parallel/test_processes.py, as a SLURM task.

It writes what it reads of an epoch, and how bad input ends, as JSON to a file.

python -m tests.parallel.process_worker FOLDER, with SLURM's variables
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from tests.parallel import test_exchange
from tests.ranking.small_everything import everything, first_steps
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.data.feed import DeviceFeed, EventStore, SharedFeed
from ultra_hstu.parallel import processes
from ultra_hstu.retrieval.batch import Events
from ultra_hstu.train import train

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
PLACEMENTS = ("stream", "device", "stream, exchanged")
RANKING = with_(test_exchange.RANKING, model__window=(4,), data__placement="stream")


def events_read(task):
    """Events that an epoch brings to this process's devices, by the index of their group.

    Where each device reads events of its own, by that of the device.
    """
    loader = task.loader("train", batch_users=16, steps_per_call=3)
    found = {}
    for group in loader.groups(loader.plan(seed=1, epoch=2)):
        feed, count = group.feed, task.config.parallel.data
        if isinstance(feed, SharedFeed):
            feed, count = feed.own, jax.device_count()
        arrays = (
            feed.columns_SB
            if isinstance(feed, DeviceFeed)
            else {"time": feed.batches_S.time_T, "weight": feed.batches_S.weight_T}
        )
        shards = {
            name: {
                shard.index[1].start or 0: np.asarray(shard.data)
                for shard in array.addressable_shards
            }
            for name, array in arrays.items()
        }
        for place in shards[next(iter(shards))]:
            for step in range(group.steps):
                part = {name: by_place[place][step] for name, by_place in shards.items()}
                if isinstance(feed, DeviceFeed):
                    batch = feed.gather(task.events, part, np)
                    part = {"time": batch.time_T, "weight": batch.weight_T}
                number = place * count // next(iter(arrays.values())).shape[1]
                found.setdefault(number, []).extend(part["time"][part["weight"] > 0].tolist())
    return sorted(found.items())


def error(config, folder, task=None):
    try:
        train(config, folder, console=Console(quiet=True), task=task)
    except ValueError as raised:
        return str(raised)
    raise AssertionError("no error")


def main(folder):
    processes.join(None, None, None, detect=True, seconds=60)
    me = jax.process_index()
    base = with_(
        small_config(folder / "data"),
        model__relative_bias=False,
        model__window=(4,),
        data__batch_tokens=256,
    )
    task = tasks.load(base)
    read = {}
    for data, context in MESHES:
        for placement in PLACEMENTS:
            placed, _, exchanged = placement.partition(", ")
            if exchanged and context == 1:
                continue
            config = with_(
                base,
                parallel__data=data,
                parallel__context=context,
                parallel__groups=8,
                data__placement=placed,
                parallel__batches=exchanged or "replicated",
            )
            numbered = np.arange(task.interactions.num_events, dtype=np.int32)
            on_mesh = dataclasses.replace(
                tasks.of(config, task.interactions), store=EventStore(Events(numbered, numbered))
            )
            read[f"{data}x{context} {placement}"] = events_read(on_mesh)
    test_exchange.require_same_batches(RANKING, 2, 4, parallel__batches="exchanged")
    wrong = (
        dataclasses.replace(task.interactions, items=np.roll(task.interactions.items, 1))
        if me == 2
        else task.interactions
    )
    good = with_(base, parallel__data=8)
    errors = {
        "configuration": error(with_(good, train__seed=2 + (me == 3)), folder / "run"),
        "mesh": error(with_(base, parallel__data=3, parallel__context=2), folder / "run"),
        "one device": error(base, folder / "run"),
        "folder": error(good, folder),
        "data": error(good, folder / "run", tasks.of(good, wrong)),
    }
    agreed = [
        processes.all_gather(me),
        processes.broadcast(lambda: me + 10),
        processes.all_reduce_max(me, on_mesh.recipe.mesh)(),
    ]
    train_E = np.concatenate(
        [
            np.arange(*bounds)
            for bounds in zip(task.splits.train.start, task.splits.train.stop, strict=True)
        ]
    )
    all_papers = everything(folder / "everything", data=2, context=4)
    steps = first_steps(all_papers, processes.barrier)  # Gloo waits half a minute for all
    result = {"read": read, "errors": errors, "agreed": agreed, "events": train_E.tolist()}
    result["everything"] = steps
    (folder / f"process_{me}.json").write_text(json.dumps(result))
    # The thread that watches the others now asks without a pause, so it is in native code when
    # Python ends. There a process would abort with signal 6.
    pause, processes.POLL_SECONDS = processes.POLL_SECONDS, 0
    time.sleep(pause)
    processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
