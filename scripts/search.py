"""The search for `ml1m_best`: candidates, and how one is chosen by validation items alone.

Every candidate changes HSTU-large with full softmax in one respect. Those that help by more than a
standard error are then put together, the best first. Of all that was tried the best mean over
seeds is the recipe: NDCG@10 of the validation items, which are not those of the table.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments import configs
from experiments.record import Json
from scripts.studies import FIVE, StudyRun, difference, has_field
from ultra_hstu.criteria import RETRIEVAL

BASE, NAME, SEEDS = "ml1m_hstu_large", "ml1m_best", (42, 43)
START: dict[str, object] = {"train.protocol": "validated", "loss.kind": "full"}
Changes = dict[str, object]  # values by field


def candidates() -> dict[str, Changes]:
    """What is tried alone, by name."""
    found: dict[str, Changes] = {
        "128 negatives": {"loss.kind": "sampled"},
        "512 negatives": {"loss.kind": "sampled", "loss.negatives": 512},
        "dropout 0.1": {"model.input_dropout": 0.1, "model.linear_dropout": 0.1},
        "dropout 0.3": {"model.input_dropout": 0.3, "model.linear_dropout": 0.3},
        "dropout 0.4": {"model.input_dropout": 0.4, "model.linear_dropout": 0.4},
        "temperature 0.03": {"loss.temperature": 0.03},
        "temperature 0.07": {"loss.temperature": 0.07},
        "width 64": {"model.width": 64, "model.qk_width": 32, "model.v_width": 32},
        "width 100": {"model.width": 100, "model.qk_width": 50, "model.v_width": 50},
        "4 blocks": {"model.layers": 4},
        "12 blocks": {"model.layers": 12},
        "learning rate 0.0005": {"optim.learning_rate": 5e-4},
        "learning rate 0.002": {"optim.learning_rate": 2e-3},
        "warmup": {"optim.warmup_steps": 480},
        "learning rate falls": {"optim.decay_steps": 4800},
        "weight decay": {"optim.weight_decay": 0.01},
        "longer": {"train.epochs": 301, "train.patience": 30},
        "first items 0.005": {"model.item_std": 0.005},
        "first items 0.1": {"model.item_std": 0.1},
        "first projections 0.09": {"model.uvqk_std": 0.09},
        "no relative bias": {"model.relative_bias": False},
        "no time bias": {"model.time_buckets": 0},
        "bfloat16": {"model.dtype": "bfloat16"},
    }
    if has_field("model.divide_by"):
        found["own length"] = {"model.divide_by": "length"}
    if "ml1m_hstu_large_mol" in configs.CONFIGS:
        found["mixture of logits"] = difference("ml1m_hstu_large_mol", BASE)
    return found


def trial(name: str, changes: Changes) -> StudyRun:
    """A run of the search, which does not look at the test items."""
    words = "_".join(name.replace(".", "").replace("+", " ").split())
    return StudyRun(f"search_{words}", BASE, START | changes, SEEDS, 90.0, trial=True)


def value(record: Json) -> list[float]:
    """The metric that chooses, of each seed. Raises ValueError for one of test items."""
    for run in record["runs"]:
        if run["split"] != "validation":
            raise ValueError(
                f"{record['command']} has measured {run['split']} items, by which nothing is "
                "chosen: delete its record"
            )
    return [run["best"][RETRIEVAL.selection] for run in record["runs"]]


def stacks(base: Sequence[float], tried: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """Which candidates to put together: the best two, three, ... of those that helped.

    Help is a gain above the standard error of a difference of two means, with the variance of a
    seed pooled over everything that was tried. A candidate that changes what a better one has
    changed is left out.
    """
    everything = [base, *tried.values()]
    variance = statistics.mean(statistics.variance(values) for values in everything)
    error = math.sqrt(2 * variance / len(base))
    gains = {
        name: statistics.mean(values) - statistics.mean(base) for name, values in tried.items()
    }
    known, taken, fields = candidates(), list[str](), set[str]()
    for name in sorted(gains, key=lambda name: -gains[name]):
        if gains[name] > error and not fields & known[name].keys():
            taken.append(name)
            fields |= known[name].keys()
    return [tuple(taken[:count]) for count in range(2, len(taken) + 1)]


def together(names: Sequence[str]) -> Changes:
    """The changes of several candidates."""
    known, found = candidates(), Changes()
    for name in names:
        found |= known[name]
    return found


def summary(records: Mapping[str, Json], changes: Mapping[str, Changes]) -> list[Json]:
    """What each trial has found, the best first: `tried` of the record of a search."""
    rows = []
    for name, record in records.items():
        values = value(record)
        metrics = {
            metric: statistics.mean(run["best"][metric] for run in record["runs"])
            for metric in ("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr")
        }
        rows.append(
            {
                "name": name,
                "changes": changes[name],
                "seeds": [run["seed"] for run in record["runs"]],
                "values": values,
                "mean": metrics,
                "stdev": statistics.stdev(values),
                "epochs": [run["epochs"] for run in record["runs"]],
                "seconds": [run["seconds"] for run in record["runs"]],
                "command": record["command"],
            }
        )
    return sorted(rows, key=lambda row: -row["mean"][RETRIEVAL.selection])


def confirmed(changes: Changes) -> StudyRun:
    """The chosen recipe under five seeds, which looks at the test items once."""
    return StudyRun(f"{NAME}_validated", BASE, START | changes | {"name": NAME}, FIVE, 90.0)
