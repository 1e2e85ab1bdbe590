"""Trains a retrieval configuration with features of items beside the same one with ids alone.

python -m scripts.item_features --config=ml1m_hstu_features --workdir=runs/ml1m_item_features
    --seeds=42,43,44 --record=experiments/results/ml1m_item_features.json [--only=ids,sum]
    [--side_by_side=9]

`ids` has no features, `sum` adds them to every token, `words` those of words, too, and `series`
merges a series of tokens for each column but these. All of them are also told apart by how often
the target's item occurs in training. An
interval is a bootstrap over users, paired: 95 % of the ratios to `ids` of resampled users, each
with the mean over its seeds. --workdir keeps what every run has found, VARIANT_SEED.json: such runs
are not trained again.
"""

import concurrent.futures
import multiprocessing
import statistics
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Int
from rich.console import Console

from experiments import command
from experiments.record import Json, Record, read
from ultra_hstu import paths, report, tasks
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config
from ultra_hstu.criteria import warmth
from ultra_hstu.feature_config import FeatureConfig, Spelled
from ultra_hstu.fields import changed
from ultra_hstu.retrieval.evaluate import CorpusEvaluator
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

FLAGS = flags.FLAGS
IDS = "ids"
RESAMPLED, CUTOFF = 10_000, 10


class TrainedRun(NamedTuple):
    """What a run has found: ranks of the test targets, and the training events of their items."""

    result: Json
    rank_U: Int[np.ndarray, " U"]
    count_U: Int[np.ndarray, " U"]
    inference_gflop: float
    rows: float  # of a test history, on average

    @property
    def parts(self) -> dict[str, Bool[np.ndarray, " U"]]:
        """All users, and those whose targets are warm, cold, new."""
        return {"all": np.ones(len(self.rank_U), bool)} | warmth(self.count_U)


def variants(config: Config) -> dict[str, Config]:
    """With ids alone, with features in tokens, with those of words, too, and with merged series.

    Raises ValueError for a configuration without features.
    """
    items = config.features.items
    if not items:
        raise ValueError(f"{config.name} has no features.items, which are to be compared")
    columns = tuple(name for name in items if not Spelled.of(name).words)
    found = {
        IDS: changed(config, features=vars(FeatureConfig())),
        "sum": changed(config, features={"items": columns, "merge": "sum"}),
        "words": changed(config, features={"merge": "sum"}),
        "series": changed(config, features={"items": columns, "merge": "series"}),
    }
    if columns == items:
        found.pop("words")
    return found


def train_one(config: Config, folder: str) -> TrainedRun:
    """Trains a run and ranks the test targets with its best epoch, or reads what that has found."""
    file = paths.local(f"{folder}.json")
    if file.exists():
        found = read(file)
        ranks, counts = (np.array(found.pop(name)) for name in ("ranks", "counts"))
        return TrainedRun(found["result"], ranks, counts, found["inference_gflop"], found["rows"])
    config.validate()
    task = tasks.load(config)
    with jax.default_matmul_precision(config.train.matmul_precision):
        result = train(config, folder, console=Console(quiet=True), task=task)
        measure = task.evaluator("test")
        assert isinstance(measure, CorpusEvaluator) and measure.count_I is not None
        rank_U = measure.predict(load_params(Workdir(folder), task.recipe)[1])
    rows = float(np.mean(measure.plan.examples.lengths))
    run = TrainedRun(result, rank_U, measure.count_U, task.flops("test").inference / 1e9, rows)
    Record(file, config=config.name).add(
        result=result,
        ranks=rank_U.tolist(),
        counts=run.count_U.tolist(),
        inference_gflop=run.inference_gflop,
        rows=rows,
    )
    return run


def interval(
    found_U: Float[np.ndarray, " U"], base_U: Float[np.ndarray, " U"]
) -> dict[str, list[float] | float]:
    """The ratio of two means over the same users and their difference, with 95 % intervals."""
    rng, sums = np.random.default_rng(0), []
    for _ in range(RESAMPLED // 100):
        chosen_NU = rng.integers(0, len(found_U), (100, len(found_U)))
        sums.append(np.stack([found_U[chosen_NU].mean(1), base_U[chosen_NU].mean(1)], 1))
    found_N, base_N = np.concatenate(sums).T
    difference = found_U.mean() - base_U.mean()
    values: dict[str, list[float] | float] = {
        "difference": float(difference),
        "difference_interval": np.quantile(found_N - base_N, (0.025, 0.975)).tolist(),
    }
    if base_N.all():
        values["ratio"] = float(found_U.mean() / base_U.mean())
        values["ratio_interval"] = np.quantile(found_N / base_N, (0.025, 0.975)).tolist()
    return values


def summary(runs: list[TrainedRun]) -> Json:
    """The metrics of all seeds, their means and deviations, and the cost of a history."""
    best = {name: [run.result["best"][name] for run in runs] for name in runs[0].result["best"]}
    found: Json = {
        "mean": {name: statistics.mean(values) for name, values in best.items()},
        "seeds": {str(run.result["seed"]): run.result for run in runs},
        "inference_gflop": runs[0].inference_gflop,
        "rows": runs[0].rows,
    }
    if len(runs) > 1:
        found["stdev"] = {name: statistics.stdev(values) for name, values in best.items()}
    return found


def compared(runs: list[TrainedRun], base: list[TrainedRun]) -> Json:
    """HR@10 against that of `base`, for all users and for each part of them."""

    def hits(some: list[TrainedRun]) -> Float[np.ndarray, " U"]:
        return np.mean([run.rank_U <= CUTOFF for run in some], axis=0)

    return {
        name: interval(hits(runs)[users_U], hits(base)[users_U])
        for name, users_U in base[0].parts.items()
        if users_U.any()
    }


def main(_: list[str]) -> None:
    console, config = report.make_console(), command.resolved(FLAGS.config)
    chosen = {name: one for name, one in variants(config).items() if name in (FLAGS.only or [name])}
    record = Record(
        FLAGS.record,
        config=config.name,
        protocol=config.train.protocol,
        eval=config.evaluation,
        features=list(config.features.items),
        id_dropout=config.features.id_dropout,
        shared_device=FLAGS.side_by_side > 1,
    )
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(FLAGS.side_by_side, context) as pool:
        waiting = {
            name: [
                pool.submit(
                    train_one,
                    changed(one, train={"seed": int(seed)}),
                    str(paths.local(FLAGS.workdir) / f"{name}_{seed}"),
                )
                for seed in FLAGS.seeds
            ]
            for name, one in chosen.items()
        }
        runs: dict[str, list[TrainedRun]] = {}
        found: dict[str, Json] = {}
        for name, started in waiting.items():
            runs[name] = [one.result() for one in started]
            found[name] = summary(runs[name])
            if name != IDS and IDS in runs:
                found[name]["against_ids"] = compared(runs[name], runs[IDS])
            record.add(variants=found)
            mean = found[name]["mean"]
            console.print(f"{name}: " + "  ".join(f"{one} {x:.4f}" for one, x in mean.items()))


if __name__ == "__main__":
    command.define_config(what="the configuration with features of items")
    flags.DEFINE_string("workdir", "runs/item_features", "folder of the runs: VARIANT_SEED")
    flags.DEFINE_list("seeds", ["42", "43", "44"], "each variant is trained once with each")
    flags.DEFINE_list("only", [], "ids, sum, words, series; all without it")
    flags.DEFINE_integer("side_by_side", 1, "runs that are trained at one time")
    command.define_record()
    command.run(main)
