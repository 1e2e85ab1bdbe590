"""Times the preparation of own events, and its memory: each kind of file in a process of its own.

python -m scripts.bench.prepare [--csv_events=20000000] [--parquet_events=100000000]
    [--string_events=20000000] [--folder=FOLDER] [--record=experiments/results/prepare.json]

The CSV is in the format of MovieLens-20M, ordered by user; Parquet files are in order of time, so
that users are mixed. Users and items are drawn from skewed distributions. A number of 0 leaves a
kind out. The files are deleted behind.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.bench.terminal import show

FLAGS = flags.FLAGS
CHUNK = 1 << 20  # events that are written at one time
EVENTS_A_USER = 100
FIRST_SECOND, SECONDS = 1_400_000_000, 100_000_000
# Runs in a process of its own, whose peak of memory is that of the preparation.
MEASURE = """
import json, resource, sys, time
from ultra_hstu.config import DataConfig
from ultra_hstu.data.table import prepared
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
config = DataConfig(source="table", raw_dir=sys.argv[1], data_dir=sys.argv[2])
folder = prepared.prepare(config)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
data = prepared.load(config)
print(json.dumps({
    "events": data.num_events, "users": data.num_users, "items": data.num_items,
    "seconds": seconds, "peak_MiB": peak / 1024, "imports_MiB": before / 1024,
    "load_seconds": time.perf_counter() - started,
}))
"""


def main(_: list[str]) -> None:
    record = Record(FLAGS.record)
    kinds: dict[str, tuple[int, Callable[[Path, int], None]]] = {
        "CSV, MovieLens-20M's format": (FLAGS.csv_events, write_csv),
        "Parquet, integer ids": (FLAGS.parquet_events, write_parquet),
        "Parquet, string ids": (FLAGS.string_events, write_strings),
    }
    results: dict[str, Json] = {}
    for name, (events, write) in kinds.items():
        if not events:
            continue
        with tempfile.TemporaryDirectory(dir=FLAGS.folder or None) as folder:
            path = Path(folder) / ("events.csv" if write is write_csv else "events.parquet")
            started = time.perf_counter()
            write(path, events)
            size, written = path.stat().st_size, time.perf_counter() - started
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path), f"{folder}/prepared"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise ValueError(f"{name}: {done.stderr[-2000:]}")
            results[name] = {
                "file_MiB": size / 2**20,
                "written_seconds": written,
                **json.loads(done.stdout),
            }
        record.add(files=results)
    show(results, ("file_MiB", "events", "users", "items", "seconds", "peak_MiB", "load_seconds"))


def chunks(events: int) -> Iterator[tuple[int, int, np.random.Generator]]:
    """First and last event of each chunk, and what draws it."""
    for first in range(0, events, CHUNK):
        yield first, min(first + CHUNK, events), np.random.default_rng(first)


def drawn(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Ids below `count`, the small ones more often."""
    return (count * rng.random(size) ** 2).astype(np.int64)


def write_csv(path: Path, events: int) -> None:
    """Users ascend, as in ratings.csv."""
    schema = pa.schema(
        [("userId", pa.int64()), ("movieId", pa.int64())]
        + [("rating", pa.float64()), ("timestamp", pa.int64())]
    )
    with pa.csv.CSVWriter(path, schema) as writer:
        for first, last, rng in chunks(events):
            size = last - first
            writer.write(
                pa.table(
                    {
                        "userId": np.arange(first, last) // 144 + 1,
                        "movieId": drawn(rng, size, 26_744) + 1,
                        "rating": rng.integers(1, 11, size) / 2,
                        "timestamp": FIRST_SECOND + rng.integers(0, SECONDS, size),
                    },
                    schema,
                )
            )


def write_parquet(path: Path, events: int, strings: bool = False) -> None:
    """Ordered by time."""
    users, items = max(events // EVENTS_A_USER, 10), max(events // 1000, 10)
    writer = None
    for first, last, rng in chunks(events):
        size = last - first
        ids = {"user_id": drawn(rng, size, users), "item_id": drawn(rng, size, items)}
        table = pa.table(
            {
                name: np.char.add(name[0] + "_", values.astype(str)) if strings else values
                for name, values in ids.items()
            }
            | {
                "timestamp": FIRST_SECOND + np.arange(first, last) * SECONDS // events,
                "rating": rng.integers(1, 6, size).astype(np.float32),
            }
        )
        writer = writer or pa.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def write_strings(path: Path, events: int) -> None:
    write_parquet(path, events, strings=True)


if __name__ == "__main__":
    flags.DEFINE_integer("csv_events", 20_000_000, "events of the CSV")
    flags.DEFINE_integer("parquet_events", 100_000_000, "events of the Parquet file of integer ids")
    flags.DEFINE_integer("string_events", 20_000_000, "events of the Parquet file of string ids")
    flags.DEFINE_string("folder", "", "where the files are written; empty: the usual one")
    command.define_record()
    command.run(main)
