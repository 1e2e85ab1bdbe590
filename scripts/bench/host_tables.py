"""Times the item rows of a request from host memory to the device, packed in each way.

python -m scripts.bench.host_tables [--items=200000] [--width=512] [--rows=16384]
    [--record=experiments/results/host_tables_h100.json]

They are gathered on the host, moved, and unpacked on the device. The rows are those of a history or
of candidates, drawn uniformly without repetition: as little as a cache of the processor can help
with.
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.bench.terminal import show
from ultra_hstu.serving import host_tables

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    items, width, rows = FLAGS.items, FLAGS.width, FLAGS.rows
    if not 1 <= rows <= items:
        raise ValueError(f"--rows={rows} must be in 1..{items}, the number of items")
    record = Record(FLAGS.record, items=items, width=width, rows=rows)
    tables = {}
    for kind in FLAGS.kinds:
        tables[kind] = measure(kind, items, width, rows, FLAGS.repetitions)
        record.add(tables=tables)
    times = ("gather_ms", "transfer_ms", "unpack_ms")
    show(tables, ("row_bytes", "bytes", *times, "gigabytes_a_second"), "table")


def measure(kind: str, items: int, width: int, rows: int, repetitions: int) -> Json:
    """Milliseconds of each part of one request, medians, and bytes."""
    rng = np.random.default_rng(0)
    host = host_tables.HostTable.of(
        rng.standard_normal((items, width), dtype=np.float32) * 0.02, kind
    )
    unpack = jax.jit(host_tables.unpacked)
    times: dict[str, list[float]] = {"gather_ms": [], "transfer_ms": [], "unpack_ms": []}
    for repetition in range(repetitions + 1):
        ids = rng.choice(items, rows, replace=False).astype(np.int32)
        moments = [time.perf_counter()]
        packed, _ = host.request(ids)
        moments.append(time.perf_counter())
        here = jax.block_until_ready(jax.device_put(packed))
        moments.append(time.perf_counter())
        jax.block_until_ready(unpack(here))
        moments.append(time.perf_counter())
        if repetition:  # the first one compiles
            for name, start, stop in zip(times, moments, moments[1:], strict=False):
                times[name].append(1e3 * (stop - start))
    found = {name: statistics.median(samples) for name, samples in times.items()}
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    return {
        "row_bytes": host.row_bytes,
        "bytes": moved,
        **found,
        "gigabytes_a_second": moved / found["transfer_ms"] / 1e6,
    }


if __name__ == "__main__":
    flags.DEFINE_integer("items", 200_000, "rows of the table")
    flags.DEFINE_integer("width", 512, "width of a row")
    flags.DEFINE_integer("rows", 16384, "different items of a request")
    flags.DEFINE_integer("repetitions", 20, "requests that are timed")
    flags.DEFINE_list("kinds", list(host_tables.KINDS), "which kinds of table")
    command.define_record()
    command.run(main)
