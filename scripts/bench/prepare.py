"""Times the preparation of events, and its memory: each kind of file in a process of its own.

python -m scripts.bench.prepare [--csv_events=20000000] [--parquet_events=100000000]
    [--string_events=20000000] [--movielens_events=20000000] [--books_events=22507155]
    [--folder=FOLDER] [--record=experiments/results/prepare.json]

The CSV is in the format of MovieLens-20M, ordered by user; Parquet files are in order of time, so
that users are mixed. These are read as own files (`table`). MovieLens-20M and Books of Amazon 2014
are read as public sets; Books has as many lines, users and items as the official file, in order of
items. Users and items are drawn from skewed distributions. A number of 0 leaves a kind out, and
what the record holds of it stays. The files are deleted behind.
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
MOVIES = 26_744  # with ratings in MovieLens-20M
# Ratings, users and items of ratings_Books.csv.
BOOKS, BOOKS_USERS, BOOKS_ITEMS = 22_507_155, 8_026_324, 2_330_066
LETTERS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
STARS = pa.array(["1.0", "2.0", "3.0", "4.0", "5.0"])
# Runs in a process of its own, whose peak of memory is that of the preparation.
MEASURE = """
import json, resource, sys, time
from ultra_hstu.config import DataConfig
from ultra_hstu.data.table import prepared
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started, cpu_before = time.perf_counter(), cpu()
config = DataConfig(source=sys.argv[1], raw_dir=sys.argv[2], data_dir=sys.argv[3])
prepared.prepare(config, prepared.open_source(config))
seconds, cpu_seconds = time.perf_counter() - started, cpu() - cpu_before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
data = prepared.load(config)
print(json.dumps({
    "events": data.num_events, "users": data.num_users, "items": data.num_items,
    "seconds": seconds, "cpu_seconds": cpu_seconds,
    "peak_MiB": peak / 1024, "imports_MiB": before / 1024,
    "load_seconds": time.perf_counter() - started,
}))
"""


def main(_: list[str]) -> None:
    record = Record(FLAGS.record, grows=True)
    csv, parquet = "events.csv", "events.parquet"
    kinds: dict[str, tuple[int, str, str, Callable[[Path, int], None]]] = {
        "CSV, MovieLens-20M's format": (FLAGS.csv_events, "table", csv, write_csv),
        "Parquet, integer ids": (FLAGS.parquet_events, "table", parquet, write_parquet),
        "Parquet, string ids": (FLAGS.string_events, "table", parquet, write_strings),
        "ml-20m": (FLAGS.movielens_events, "ml-20m", "ratings.csv", write_movielens),
        "amazon-2014/Books": (
            FLAGS.books_events,
            "amazon-2014/Books",
            "ratings_Books.csv",
            write_books,
        ),
    }
    results: dict[str, Json] = record.values.get("files", {})
    for name, (events, source, file, write) in kinds.items():
        if not events:
            continue
        with tempfile.TemporaryDirectory(dir=FLAGS.folder or None) as folder:
            path = Path(folder) / "raw" / file
            path.parent.mkdir()
            started = time.perf_counter()
            write(path, events)
            size, written = path.stat().st_size, time.perf_counter() - started
            raw = path if source == "table" else path.parent
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, source, str(raw), f"{folder}/prepared"],
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
    shown = "file_MiB events users items seconds cpu_seconds peak_MiB load_seconds"
    show(results, shown.split())


def chunks(events: int) -> Iterator[tuple[int, int, np.random.Generator]]:
    """First and last event of each chunk, and what draws it."""
    for first in range(0, events, CHUNK):
        yield first, min(first + CHUNK, events), np.random.default_rng(first)


def drawn(rng: np.random.Generator, size: int, count: int, power: int = 2) -> np.ndarray:
    """Ids below `count`, the small ones more often, the more so the higher the power."""
    return (count * rng.random(size) ** power).astype(np.int64)


def write_csv(path: Path, events: int) -> None:
    """Users ascend, as in ratings.csv."""
    schema = pa.schema(
        [("userId", pa.int64()), ("movieId", pa.int64())]
        + [("rating", pa.float64()), ("timestamp", pa.int64())]
    )
    plain = pa.csv.WriteOptions(quoting_style="none")
    with pa.csv.CSVWriter(path, schema, write_options=plain) as writer:
        for first, last, rng in chunks(events):
            size = last - first
            writer.write(
                pa.table(
                    {
                        "userId": np.arange(first, last) // 144 + 1,
                        "movieId": drawn(rng, size, MOVIES) + 1,
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


def write_movielens(path: Path, events: int) -> None:
    """With the movies file beside it."""
    write_csv(path, events)
    movies = [f"{movie},Film {movie} (1995),Drama|Comedy" for movie in range(1, MOVIES + 1)]
    text = "\n".join(["movieId,title,genres", *movies])
    path.with_name("movies.csv").write_text(f"{text}\n")


def write_books(path: Path, events: int, power: int = 2) -> None:
    """Every user and every item at least once, some far more often; item after item."""
    rng = np.random.default_rng(0)
    users = max(events * BOOKS_USERS // BOOKS, 1)
    items = max(events * BOOKS_ITEMS // BOOKS, 1)
    more_items = drawn(rng, events - items, items, power)
    item = np.sort(np.concatenate([np.arange(items), more_items]))
    more_users = drawn(rng, events - users, users, power)
    user = rng.permutation(np.concatenate([np.arange(users), more_users]))
    user_ids, item_ids = words(b"A", users, 13), words(b"B", items, 9)
    with pa.csv.CSVWriter(
        path,
        pa.schema(
            [("user", pa.string()), ("item", pa.string())]
            + [("rating", pa.string()), ("timestamp", pa.int64())]
        ),
        write_options=pa.csv.WriteOptions(include_header=False, quoting_style="none"),
    ) as writer:
        for first, last, _ in chunks(events):
            size = last - first
            writer.write(
                pa.table(
                    {
                        "user": user_ids.take(pa.array(user[first:last])),
                        "item": item_ids.take(pa.array(item[first:last])),
                        "rating": STARS.take(pa.array(rng.integers(0, 5, size))),
                        "timestamp": FIRST_SECOND + 86_400 * rng.integers(-3000, 100, size),
                    }
                )
            )


def words(first: bytes, count: int, length: int) -> pa.Array:
    """Ids of a letter and so many letters or digits, in no order."""
    code = np.arange(count, dtype=np.uint64) * np.uint64(2_654_435_761)
    letters = np.full((count, 1 + length), ord(first), np.uint8)
    for place in range(length):
        letters[:, 1 + place] = LETTERS[(code % np.uint64(36)).astype(np.int64)]
        code //= np.uint64(36)
    width = pa.binary(1 + length)
    buffers = [None, pa.py_buffer(letters.tobytes())]
    return pa.Array.from_buffers(width, count, buffers).cast(pa.binary()).cast(pa.string())


if __name__ == "__main__":
    flags.DEFINE_integer("csv_events", 20_000_000, "events of the CSV")
    flags.DEFINE_integer("parquet_events", 100_000_000, "events of the Parquet file of integer ids")
    flags.DEFINE_integer("string_events", 20_000_000, "events of the Parquet file of string ids")
    flags.DEFINE_integer("movielens_events", 20_000_000, "events of MovieLens-20M")
    flags.DEFINE_integer("books_events", BOOKS, "events of Amazon 2014, Books")
    flags.DEFINE_string("folder", "", "where the files are written; empty: the usual one")
    command.define_record()
    command.run(main)
