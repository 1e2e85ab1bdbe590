"""Trains the grid of the scaling curve: HSTU and ULTRA-HSTU over length and depth.

python -m scripts.scaling.run --workdir=runs/scaling --record=experiments/results/scaling_h200.json
    [--minutes=30] [--sets=synthetic_long,assistments] [--raw_dir=FOLDER] [--list] [--part=1/4]

--list prints the runs in their order, with operations and predicted seconds, and trains nothing.
`scaling_counts` holds these predictions: two hours of one H200 for all runs, and less than half an
hour for those at the middle depth, which come first. --minutes trains what fits; the same command
goes on with what is left, after a kill too, or on another machine that has the record. A set that
cannot be read is named, and the other one is trained.

--part=K/N trains every N-th run, from the K-th: N such commands at one time, each with a --workdir
of its own, share a GPU and the record. Their seconds are no measure of speed.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.scaling import grid
from scripts.scaling.grid import Histories, Point
from scripts.scaling.sweep import ScalingRun, add_data, finished, sweep
from ultra_hstu.config import Config
from ultra_hstu.data import best_prediction, sources
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.ranking.metrics import normalized_entropy
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.task import Task

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    if unknown := sorted(set(FLAGS.sets) - set(grid.SETS)):
        raise ValueError(f"--sets: there is no {unknown[0]!r}; use {', '.join(grid.SETS)}")
    data, missing = read_sets(FLAGS.sets, FLAGS.raw_dir, FLAGS.data_dir)
    jobs = part_of(jobs_of(data, FLAGS.data_dir, FLAGS.raw_dir), FLAGS.part)
    console, record = command.progress_console(), Record(FLAGS.record, grows=True)
    for note in missing:
        console.print(note, markup=False, soft_wrap=True)
    if FLAGS.list:
        for job in jobs:
            told = "{training:.3g} operations a request in training, {inference:.3g} without"
            console.print(f"{job.name}: {told.format(**job.about)}; {job.seconds:.0f} s")
        total = sum(job.seconds for job in jobs) / 60
        console.print(f"{len(jobs)} runs, about {total:.0f} minutes of one H200")
        return
    add_data(record, {name: one.fingerprint() for name, one in data.items()})
    left = sweep(
        jobs,
        Path(FLAGS.workdir),
        record,
        load=functools.partial(task_of, data),
        measure=measure,
        minutes=FLAGS.minutes,
        console=console,
    )
    done = len(finished(record))
    console.print(f"{done} runs are in the record, {len(left)} are left for the same command")
    if missing:
        raise ValueError("; ".join(missing))


def part_of(jobs: Sequence[ScalingRun], part: str) -> Sequence[ScalingRun]:
    """Every N-th job, from the K-th, of K/N. Raises ValueError for another text."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or (k := int(match[1])) > (n := int(match[2])):
        raise ValueError(f"--part={part}: write K/N with K from 1 to N, such as 2/4")
    return jobs[k - 1 :: n]


def read_sets(
    names: list[str], raw_dir: str | None, data_dir: str | None
) -> tuple[dict[str, Interactions], list[str]]:
    """The data of the sets, by name, and what to do about those that cannot be read."""
    data, missing = {}, []
    for name in names:
        config = located(grid.SETS[name].base, data_dir, raw_dir).data
        try:
            data[name] = load_interactions(config)
        except (ValueError, OSError) as error:
            missing.append(
                f"{name} is left out ({error}): get it with python -m experiments.inspect "
                f"--config.data.source={config.source}, or name a copy by --raw_dir"
            )
    return data, missing


def located(config: Config, data_dir: str | None, raw_dir: str | None) -> Config:
    """The configuration with the folders of this machine."""
    generated = config.data.source in sources.GENERATED
    return changed(config, data={"data_dir": data_dir, "raw_dir": None if generated else raw_dir})


def jobs_of(
    data: dict[str, Interactions], data_dir: str | None = None, raw_dir: str | None = None
) -> list[ScalingRun]:
    """The runs of all sets: those of the same worth follow one another."""
    jobs: list[tuple[float, ScalingRun]] = []
    for name, interactions in data.items():
        of = grid.SETS[name]
        train, test = (Histories.of(of.base, interactions, part) for part in ("train", "test"))
        points = grid.points(name)
        for place, point in enumerate(points):
            job = job_of(point, train, test)
            config = located(job.config, data_dir, raw_dir)
            jobs.append((place / len(points), dataclasses.replace(job, config=config)))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def job_of(point: Point, train: Histories, test: Histories) -> ScalingRun:
    of = grid.SETS[point.data]
    config = grid.with_steps(grid.config_of(point), train, of.events)
    config.validate()
    training, inference = train.cost(config), test.cost(config)
    about = dataclasses.asdict(point) | {
        "training": training.training,
        "inference": inference.inference,
        "events": train.events(config) * (config.train.steps or 0) * config.data.batch_users,
    }
    seconds = grid.seconds(config, training, of.tflops)
    return ScalingRun(point.name, point.data, config, seconds, about)


def task_of(data: dict[str, Interactions], config: Config) -> Task:
    """The task of a run, on data that is in memory."""
    (name,) = (name for name in data if config.name.startswith(f"{name}_"))
    return RankingTask.of(config, data[name])


def measure(job: ScalingRun, task: Task, workdir: Path) -> Json:
    """Of histories whose best prediction is known, its NE on the events that the run was tested on,
    and the floor: what it is to be expected.

    Channels of a mixture reach further back than `data.max_history`: nothing is said of them.
    """
    if job.config.data.source != sources.SYNTHETIC_LONG or job.config.model.channels:
        return {}
    long, data, columns = job.config.data.synthetic_long, task.interactions, task.columns("test")
    length, first = job.config.data.max_history, columns["target"].astype(np.int64)
    start = np.maximum(first - length, data.offsets[columns["user"]])
    asked = [np.arange(at, at + count) for at, count in zip(first, columns["count"], strict=True)]
    logit_P = np.concatenate(best_prediction.logits(data, long, start, first, asked))
    liked_P = data.actions["liked"][np.concatenate(asked)]
    best = normalized_entropy(logit_P, liked_P, np.ones(len(liked_P)))
    return {"best_possible": best, "floor": best_prediction.floor(long, length)}


if __name__ == "__main__":
    command.as_path(flags.DEFINE_string("workdir", "runs/scaling", "folder of all runs"))
    flags.DEFINE_float("minutes", None, "train what is predicted to end by then", 0.0)
    flags.DEFINE_list("sets", list(grid.SETS), "data sets, of those of scripts.scaling.grid")
    command.as_path(flags.DEFINE_string("raw_dir", None, "a copy of ASSISTments 2017"))
    command.as_path(flags.DEFINE_string("data_dir", None, "where prepared data goes"))
    flags.DEFINE_string("part", "1/1", "K/N: every N-th run, from the K-th")
    flags.DEFINE_bool("list", False, "print the runs and their predictions, and train nothing")
    command.define_record()
    command.run(main)
