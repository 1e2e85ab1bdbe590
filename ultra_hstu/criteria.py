"""What a run is judged by: the metric that chooses its best epoch, and those that tables and curves
show.
"""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Criteria:
    selection: str
    higher_is_better: bool
    table: tuple[str, ...]  # columns at the end of a training run
    details: tuple[str, ...]  # columns of an evaluation
    curves: tuple[
        str, ...
    ]  # what the progress line, the curves and the history of a record show, beside the loss
    tasks: tuple[
        str, ...
        # a table has one line for each, whose metrics are named METRIC/TASK; none: one line in all
    ] = ()

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` improves on the best so far; NaN never does, anything else improves on
        None.
        """
        if best is None:
            return not math.isnan(value)
        return value > best if self.higher_is_better else value < best


RETRIEVAL = Criteria(
    selection="ndcg@10",
    higher_is_better=True,
    table=("hr@10", "hr@50", "ndcg@10", "mrr"),
    details=("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr"),
    curves=("hr@10", "ndcg@10"),
)


def ranking(tasks: Mapping[str, str]) -> Criteria:
    """Of tasks, name -> "binary" or "regression": the mean NE of the binary ones, or without any
    the mean squared error, is to be low.
    """
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
        tasks=tuple(tasks),
    )


def display_name(name: str) -> str:
    """A metric's name for people: "hr@10" -> "HR@10", "log_loss/correct" -> "LOG LOSS correct"."""
    metric, _, task = name.partition("/")
    return f"{metric.replace('_', ' ').upper()} {task}".strip()
