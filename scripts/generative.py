"""Generative against impression-level training of a ranking run, at equal training FLOPs.

python -m scripts.generative --config=assistments_rank_hstu --workdir=runs/generative
    --record=experiments/results/generative_assistments.json [--seeds=42,43,44]
    [--only=generative,requests] [--list] [--budget_tflop=300]
python -m scripts.generative --config=synthetic_rank_hstu --workdir=runs/generative_synthetic
    --record=experiments/results/generative_synthetic.json

HSTU's claim (arXiv 2402.17152): where a model is trained on every impression, the encoder reads a
user's history once for each of n events; where every item of a history is supervised at once and
users are sampled at the rate 1/n, once. All variants are evaluated alike, on requests of
`rank.targets` events. Each trains for as many whole epochs as come closest to the budget, by
`ultra_hstu.flops`: that of the configuration itself for all its epochs, or --budget_tflop. `curve`
of a run holds its operations and validation NE at up to 16 points; for the stream, `best_possible`
is what Bayes' rule reaches.

The record is written after every run, and finished runs are not trained again. `--list` prints
operations and epochs. Predicted on an H200: `10 minutes` for ASSISTments (4 variants, 3 seeds, 216
TFLOP a run, 800 to 3,400 steps), `25 minutes` for the stream, which has more steps.
"""

import math
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console

from experiments import command
from experiments.record import Json, Record
from scripts.ablation import describe, task_of
from ultra_hstu import report
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.criteria import Metrics, mean_and_deviation
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.data.sources import SYNTHETIC
from ultra_hstu.data.synthetic import LIKED
from ultra_hstu.fields import changed
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.train import train

FLAGS = flags.FLAGS
POINTS = 16  # evaluations of a run, at most
VARIANTS: dict[str, dict[str, object]] = {  # fields of `rank`
    "impressions": {"train_targets": 1, "requests": "one"},  # one target a pass, as a DLRM
    "requests": {},  # `rank.targets` of them share a pass
    "requests_one": {"requests": "one"},  # the same, users at the rate 1/n
    # Every item of a history in one pass, users at the rate 1/n.
    "generative": {"supervise": "all", "requests": "one"},
}


def variants(config: Config, interactions: Interactions, budget: float | None) -> dict[str, Json]:
    """Each variant's configuration and cost; its epochs come closest to the budget (GFLOP).

    Raises:
      ValueError: an input that is not interleaved, which `supervise="all"` needs.
    """
    found: dict[str, Json] = {}
    for name, fields in VARIANTS.items():
        variant = changed(config, rank=fields)
        cost = describe(task_of(variant, interactions))
        cost["epoch_gflop"] = cost["epoch_requests"] * cost["training_gflop"]
        found[name] = {"config": variant, "cost": cost}
    if budget is None:
        budget = config.train.epochs * found["requests"]["cost"]["epoch_gflop"]
    for one in found.values():
        epochs = max(1, round(budget / one["cost"]["epoch_gflop"]))
        every = math.ceil(epochs / POINTS)
        train = {"epochs": epochs, "eval_every": every, "patience": epochs}
        one["config"] = changed(one["config"], train=train | {"checkpoint_every": every})
        one["cost"]["trained_gflop"] = epochs * one["cost"]["epoch_gflop"]
    return found


def run(
    chosen: dict[str, Json],
    interactions: Interactions,
    seeds: list[int],
    folder: Path,
    record: Record,
    console: Console,
) -> None:
    """Trains every variant with every seed; the record is written after each run."""
    found: dict[str, Json] = {}
    for name, one in chosen.items():
        task, results = task_of(one["config"], interactions), []
        for seed in seeds:
            seeded = changed(one["config"], train={"seed": seed})
            place = folder / name / f"seed_{seed}"
            result = train(seeded, place, console=console, task=task)
            epochs = report.read_metrics(place / "metrics.jsonl")
            curve = [
                {"gflop": epoch["epoch"] * one["cost"]["epoch_gflop"], "ne": epoch["ne"]}
                for epoch in epochs
                if "ne" in epoch
            ]
            results.append(result | {"curve": curve})
            found[name] = one["cost"] | {"epochs": seeded.train.epochs, "runs": results}
            if len(results) > 1:
                mean, deviation = mean_and_deviation([done["best"] for done in results])
                found[name] |= {"mean": mean, "stdev": deviation}
            record.add(variants=found)


def best_possible(task: RankingTask) -> Metrics:
    """Test metrics of who knows how the synthetic stream likes, from the history of a request.

    That is Bayes' rule: a record has a taste for a category with probability 1/2, and each like, or
    its absence, tells it rightly with probability `LIKED`. A model that reads the same can be
    better by luck alone.
    """
    evaluator, config, data = task.evaluator("test"), task.config, task.interactions
    event_P, user_P, events = evaluator.event_P, evaluator.user_P, data.num_events
    first_P, size = task.parts.test[user_P], config.rank.targets
    stop_P = first_P + (event_P - first_P) // size * size  # where the request begins
    start_P = np.maximum(task.parts.first[user_P], stop_P - config.data.max_history)
    user_E = np.repeat(np.arange(data.num_users), data.lengths)
    categories = config.data.synthetic.categories
    group_E = user_E * categories + (data.items - 1) % categories
    order_E = np.argsort(group_E, kind="stable")
    place_E = group_E[order_E] * events + order_E
    likes = np.append(0, np.cumsum(data.actions["is_like"][order_E]))
    from_P, to_P = (
        np.searchsorted(place_E, group_E[event_P] * events + edge_P) for edge_P in (start_P, stop_P)
    )
    net_P = 2 * (likes[to_P] - likes[from_P]) - (to_P - from_P)
    taste_P = 1 / (1 + (LIKED / (1 - LIKED)) ** -net_P.astype(np.float64))
    like_P = (1 - LIKED) + (2 * LIKED - 1) * taste_P
    return evaluator.metrics(np.log(like_P / (1 - like_P)).astype(np.float32)[:, None])


def main(_: list[str]) -> None:
    console, config = report.make_console(), from_config_dict(FLAGS.config)
    if unknown := sorted(set(FLAGS.only) - set(VARIANTS)):
        raise ValueError(f"--only has {unknown[0]!r}: the variants are {', '.join(VARIANTS)}")
    interactions = load_interactions(config.data)
    budget = None if FLAGS.budget_tflop is None else 1e3 * FLAGS.budget_tflop
    found = variants(config, interactions, budget)
    chosen = {name: found[name] for name in VARIANTS if name in (FLAGS.only or VARIANTS)}
    for name, one in chosen.items():
        cost, epochs = one["cost"], one["config"].train.epochs
        console.print(
            f"{name}: {epochs} epochs of {cost['epoch_requests']} requests, "
            f"{cost['training_gflop']:.4g} GFLOP each, {cost['trained_gflop'] / 1e3:.4g} TFLOP"
        )
    if FLAGS.list:
        return
    record = Record(
        FLAGS.record, config=config.name, protocol=config.train.protocol, eval=config.evaluation
    )
    task = task_of(config, interactions)
    record.values["baselines"] = task.baselines("test")
    if config.data.source == SYNTHETIC:
        record.values["best_possible"] = best_possible(task)
        console.print(f"best possible: NE {record.values['best_possible']['ne']:.4f}")
    seeds = [int(seed) for seed in FLAGS.seeds]
    run(chosen, interactions, seeds, Path(FLAGS.workdir), record, console)


if __name__ == "__main__":
    command.define_config(what="a ranking configuration with rank.input='interleaved'")
    flags.DEFINE_string("workdir", "runs/generative", "folder of the runs: VARIANT/seed_N")
    flags.DEFINE_list("seeds", ["42", "43", "44"], "each variant is trained once with each")
    flags.DEFINE_list("only", [], "names of the variants to train; all without it")
    flags.DEFINE_float("budget_tflop", None, "training operations of a run; None: the config's own")
    flags.DEFINE_bool("list", False, "print the variants with their operations, and train nothing")
    command.define_record()
    command.run(main)
