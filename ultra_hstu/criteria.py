"""What a run is judged by: the metric that chooses its best epoch, and those that are shown."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

Metrics = dict[str, float]  # by name


@dataclasses.dataclass(frozen=True)
class Criteria:
    selection: str
    higher_is_better: bool
    table: tuple[str, ...]  # columns at the end of a training run
    details: tuple[str, ...]  # columns of an evaluation
    curves: tuple[str, ...]  # what progress line, curves and records show, beside the loss
    floor: str  # the baseline that any model beats once it has learnt something
    # A table has one line for each, whose metrics are named METRIC/TASK; none: one line in all.
    tasks: tuple[str, ...] = ()

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` improves on the best so far; NaN never does, others improve on None."""
        if best is None:
            return not math.isnan(value)
        return value > best if self.higher_is_better else value < best


RETRIEVAL = Criteria(
    selection="ndcg@10",
    higher_is_better=True,
    # repeats: share of the targets that the user has met before
    table=("hr@10", "hr@50", "ndcg@10", "mrr", "repeats"),
    details=(
        "hr@1",
        "hr@10",
        "hr@50",
        "hr@200",
        "ndcg@10",
        "ndcg@50",
        "ndcg@200",
        "mrr",
        "repeats",
    ),
    curves=("hr@10", "ndcg@10"),
    floor="popularity",
)


# Targets by how many training events their item has: name, at least, at most. New ones are cold.
WARMTH = (("warm", 100, math.inf), ("cold", 0, 99), ("new", 0, 0))


def warmth(count_P: Int[np.ndarray, " P"]) -> dict[str, Bool[np.ndarray, " P"]]:
    """Which targets each part of WARMTH has, by how many training events their item has."""
    return {name: (low <= count_P) & (count_P <= high) for name, low, high in WARMTH}


def ranking(tasks: Mapping[str, str]) -> Criteria:
    """The criteria of tasks, name -> "binary" or "regression".

    The mean NE of the binary ones is to be low; without any, the mean squared error is.

    Raises:
      ValueError: another kind.
    """
    if unknown := sorted(set(tasks.values()) - {"binary", "regression"}):
        raise ValueError(f"a task is 'binary' or 'regression', not {unknown[0]!r}")
    binary = [name for name, kind in tasks.items() if kind == "binary"]
    regressions = len(binary) < len(tasks)
    columns = (("ne", "auc", "gauc", "log_loss") if binary else ()) + (
        ("mse",) if regressions else ()
    )
    return Criteria(
        selection="ne" if binary else "mse",
        higher_is_better=False,
        table=columns,
        details=columns + (("base_rate",) if binary else ()),
        curves=("ne", f"auc/{binary[0]}") if binary else ("mse",),
        floor="base rate",
        tasks=tuple(tasks),
    )


COUNTS = ("users", "targets")  # that stand among the metrics of a part


def by_warmth(criteria: Criteria) -> Criteria:
    """The columns that are shown for each part of WARMTH, and for each task of it."""
    parts = [name for name, _, _ in WARMTH]
    tasks = tuple(f"{task}/{part}" for task in criteria.tasks for part in parts)
    details = (*criteria.table, "targets") if tasks else ("hr@10", "ndcg@10", "users")
    return dataclasses.replace(criteria, details=details, tasks=tasks or tuple(parts))


def mean_and_deviation(runs: Sequence[Mapping[str, float]]) -> tuple[Metrics, Metrics]:
    """The mean and the standard deviation (of the sample) of each metric of at least two runs."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    means = {name: statistics.mean(of_runs) for name, of_runs in values.items()}
    return means, {name: statistics.stdev(of_runs) for name, of_runs in values.items()}


def display_name(name: str) -> str:
    """A metric's name for people: "hr@10" -> "HR@10", "log_loss/correct" -> "LOG LOSS correct"."""
    metric, _, task = name.partition("/")
    return f"{metric.replace('_', ' ').upper()} {task}".strip()
