"""How much a result owes to times, and to those of a copy that are not exact.

python -m scripts.exact_times --config=ml1m_hstu --config.train.protocol=validated
    --config.data.raw_dir=data/ml-1m --rows=data/ml-1m/approximate_timestamps.npz
    --workdir=runs/exact_times --record=experiments/results/ml1m_exact_times.json
    [--seeds=42,43,44]

A configuration with the bias of times and the same without (`model.time_buckets=0`), each measured
on all users and on those whose times are all exact. --rows holds the array `row`: the numbers, from
0, of the lines of ratings.dat whose times are interpolated. Without it every user is exact. Runs in
--workdir that are finished are not trained again. About three minutes for `ml1m_hstu` on an H200,
guessed from `ml1m_hstu_validated`.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import paths, progress, tasks
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config
from ultra_hstu.criteria import Metrics, mean_and_deviation
from ultra_hstu.fields import changed
from ultra_hstu.retrieval.evaluate import CorpusEvaluator
from ultra_hstu.retrieval.metrics import mean_metrics
from ultra_hstu.retrieval.split import Examples
from ultra_hstu.step import Params
from ultra_hstu.task import Task
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

FLAGS = flags.FLAGS
USERS = ("all", "exact")


def arms(config: Config) -> dict[str, Config]:
    """With the bias of times, and without. Raises ValueError for a model that has none."""
    if not config.model.relative_bias or config.model.time_buckets == 0:
        raise ValueError(f"{config.name} has no bias of times: nothing to leave out")
    return {"times": config, "no_times": changed(config, model={"time_buckets": 0})}


def inexact_users(ratings: Path, rows: Path | None) -> Int[np.ndarray, " n"]:
    """The raw ids of users with a line, of ratings.dat, whose time is not exact.

    Raises ValueError for rows that the file does not have.
    """
    if rows is None:
        return np.array([], np.int64)
    with np.load(rows) as file:
        row_N = file["row"]
    with ratings.open("rb") as lines:
        user_E = np.array([int(line.split(b"::", 1)[0]) for line in lines])
    if len(row_N) and not 0 <= row_N.min() <= row_N.max() < len(user_E):
        raise ValueError(
            f"{rows} names line {row_N.max()}, and {ratings} has {len(user_E)} lines: it belongs "
            "to another copy"
        )
    return np.unique(user_E[row_N])


def measured(task: Task, params: Params, unfit_N: Int[np.ndarray, " n"]) -> dict[str, Metrics]:
    """The metrics of all test users, and of those who are not among `unfit_N`, raw ids."""
    measure, examples = task.evaluator("test"), task.examples("test")
    assert isinstance(measure, CorpusEvaluator) and isinstance(examples, Examples)
    rank_U = measure.predict(params)
    place_U = measure.plan.place_SB[measure.used_SP]
    user_U = task.interactions.users[examples.user[place_U]]
    return {"all": mean_metrics(rank_U), "exact": mean_metrics(rank_U[~np.isin(user_U, unfit_N)])}


def summary(runs: Mapping[int, Mapping[str, Metrics]]) -> dict[str, Json]:
    """Mean and deviation over seeds, by part of the users."""
    found: dict[str, Json] = {}
    for part in USERS:
        of_part = [run[part] for run in runs.values()]
        found[part] = {"mean": of_part[0], "stdev": {}}
        if len(of_part) > 1:
            mean, deviation = mean_and_deviation(of_part)
            found[part] = {"mean": mean, "stdev": deviation}
    return found


def main(_: list[str]) -> None:
    config = command.resolved(FLAGS.config)
    if config.data.source != "ml-1m" or config.data.raw_dir is None:
        raise ValueError(
            "lines of ratings.dat are what --rows names: set --config.data.source=ml-1m and "
            "--config.data.raw_dir to the copy"
        )
    chosen, seeds = arms(config), [int(seed) for seed in FLAGS.seeds]
    rows = paths.local(FLAGS.rows) if FLAGS.rows else None
    unfit_N = inexact_users(paths.local(config.data.raw_dir) / "ratings.dat", rows)
    working = command.progress_console()
    task = tasks.load(config, working)
    record = Record(FLAGS.record, config=config.name, eval=config.evaluation)
    record.values |= {
        "protocol": config.train.protocol,
        "seeds": seeds,
        "data": task.interactions.fingerprint(),
    }
    found: dict[str, Json] = {}
    for name, arm in chosen.items():
        of_seed: dict[int, dict[str, Metrics]] = {}
        for seed in seeds:
            folder = Workdir(paths.local(FLAGS.workdir) / name / f"seed_{seed}")
            one = changed(arm, train={"seed": seed})
            train(one, folder.path, console=working, task=task)
            of_run = task.with_config(one)
            with jax.default_matmul_precision(one.train.matmul_precision):
                params = load_params(folder, of_run.recipe)[1]
                of_seed[seed] = measured(of_run, params, unfit_N)
        found[name] = {"runs": of_seed, **summary(of_seed)}
        for part in USERS:
            mean = found[name][part]["mean"]
            progress.line(working, name, f"{part}: HR@10 {mean['hr@10']:.4f}")
    record.add(exact_users=int((~np.isin(task.interactions.users, unfit_N)).sum()), arms=found)


if __name__ == "__main__":
    command.define_config(what="a configuration of MovieLens-1M")
    flags.DEFINE_string("workdir", "runs/exact_times", "folder of the runs: times, no_times")
    flags.DEFINE_string("rows", None, "file with the array `row`: lines whose times are not exact")
    flags.DEFINE_list("seeds", ["42", "43", "44"], "each arm is trained once with each")
    command.define_record()
    command.run(main)
