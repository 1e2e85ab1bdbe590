"""MovieLens-20M and Amazon Books end to end, on generated files of their format and size.

python -m scripts.bench.published_sets [--only=ml20m_hstu,books_hstu] [--steps=3] [--share=1.0]
    [--folder=PATH] [--record=experiments/results/NAME.json]

Files like the publishers' are written, read and prepared; then the configuration of the paper takes
some training steps on them, with its own batches: seconds of each part, and the peak of memory of
the process that does all but the writing. Nothing is learnt from random events: with the real data
the same is `python -m scripts.study --study=published`. The files have as many events as the real
ones, before filters. A GPU takes about four minutes for both, most of them the files (guessed from
`prepare`).
"""

import concurrent.futures
import functools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from experiments import command, configs
from experiments.record import Json, Record
from scripts.bench.prepare import BOOKS, write_books, write_movielens
from scripts.bench.step import Timed
from scripts.bench.terminal import show
from ultra_hstu import report, tasks
from ultra_hstu.fields import changed

FLAGS = flags.FLAGS


class PublishedSet(NamedTuple):
    """A file as the publisher has it: its name, its events, and what writes one like it."""

    file: str
    events: int
    write: Callable[[Path, int], None]


SETS = {
    "ml-20m": PublishedSet("ratings.csv", 20_000_263, write_movielens),
    # So skewed, the published filters leave about as many items as of the real file: 695,762.
    "amazon-books": PublishedSet(
        "ratings_Books.csv", BOOKS, functools.partial(write_books, power=6)
    ),
}


def written(source: str, raw_dir: str, share: float) -> float:
    """Writes this share of a set's events; seconds."""
    one, started = SETS[source], time.perf_counter()
    one.write(Path(raw_dir) / one.file, int(share * one.events))
    return time.perf_counter() - started


def measured(name: str, raw_dir: str, data_dir: str, steps: int) -> Json:
    """Seconds from the files to compiled steps, milliseconds a step, and the peak of memory."""
    config = configs.named(name)
    config = changed(
        config, data={"raw_dir": raw_dir, "data_dir": data_dir}, train={"steps_per_call": 1}
    )
    started = time.perf_counter()
    task = tasks.load(config)
    read = time.perf_counter()
    with jax.default_matmul_precision(config.train.matmul_precision):
        timed = Timed(task)
        compiled = time.perf_counter()
        timed.turn(steps)
    data = task.interactions
    return {
        "users": data.num_users,
        "items": data.num_items,
        "events": data.num_events,
        "read_seconds": read - started,
        "compile_seconds": compiled - read,
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps_an_epoch": len(timed.loader.plan(seed=0, epoch=0)),
        **timed.result(),
    }


def main(_: list[str]) -> None:
    record = Record(FLAGS.record, grows=True, share=FLAGS.share)
    results: dict[str, Json] = record.values.get("sets", {})
    for name in FLAGS.only:
        source = configs.named(name).data.source
        if source not in SETS:
            raise ValueError(f"--only={name}: its data.source={source!r} is none of {list(SETS)}")
        with tempfile.TemporaryDirectory(dir=FLAGS.folder or None) as folder:
            raw_dir = Path(folder) / "raw"
            raw_dir.mkdir()
            seconds = alone(written, source, str(raw_dir), FLAGS.share)
            report.make_console().print(f"{name}: files written in {seconds:.0f} s")
            found = alone(measured, name, str(raw_dir), f"{folder}/data", FLAGS.steps)
            size = sum(path.stat().st_size for path in raw_dir.iterdir()) / 2**20
        results[name] = {"file_MiB": size, "written_seconds": seconds, **found}
        record.add(sets=results)
    shown = "file_MiB events users items read_seconds compile_seconds step_ms_median peak_MiB"
    show(results, shown.split())


def alone[R](function: Callable[..., R], *arguments: object) -> R:
    """What the function returns in a process of its own, whose peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    flags.DEFINE_list("only", ["ml20m_hstu", "books_hstu"], "configurations")
    flags.DEFINE_integer("steps", 3, "training steps that are timed")
    flags.DEFINE_float("share", 1.0, "of the publisher's events; below 1: a smoke test", 0.0, 1.0)
    flags.DEFINE_string("folder", "", "where the files are written; empty: the usual one")
    command.define_record()
    command.run(main)
