"""What a run shows: `metrics.jsonl` and TensorBoard, a progress bar, tables, learning curves."""

import contextlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import rich.box
import tensorboardX
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ultra_hstu.config import Config
from ultra_hstu.criteria import RETRIEVAL, Criteria, display_name
from ultra_hstu.workdir import write_text


class MetricLog:
    """Appends records to `metrics.jsonl` and TensorBoard, and drops those after `resume_step`."""

    def __init__(self, path: Path, tensorboard: Path, *, resume_step: int = 0):
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a")
        self._writer = tensorboardX.SummaryWriter(str(tensorboard), purge_step=resume_step + 1)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be written ({error}). Make room and start the same "
                "command again."
            ) from error
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name.replace("@", "_"), value, step)

    def close(self) -> None:
        for end in (self._file.close, self._writer.close):
            with contextlib.suppress(OSError):  # a full disk was reported by the write that met it
                end()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the torn last line of a killed run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < math.inf]


def make_console(*, quiet: bool = False) -> Console:
    """Standard output; wide enough for the tables where it is a file or a pipe.

    `quiet` prints nothing.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 120)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        refresh_per_second=4,
    )


def conditions(config: Config) -> str:
    """How metrics were measured, at the end of a title: the protocol, and what `eval` says."""
    fields = ", ".join(f"eval.{name}={value}" for name, value in config.evaluation.items())
    return f"protocol {config.train.protocol}\n{fields}"


def metrics_table(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    criteria: Criteria = RETRIEVAL,
    columns: Sequence[str] | None = None,
) -> Table:
    """One line a model, or a model and task: `rows` maps a model's name to its metrics.

    What has no value is left blank.
    """
    columns = columns or criteria.table
    table = Table("", *map(display_name, columns), title=title, box=rich.box.SIMPLE)
    for name, metrics in rows.items():
        for task in criteria.tasks or ("",):
            values = [metrics.get(f"{column}/{task}" if task else column) for column in columns]
            label = f"{name}: {task}" if len(criteria.tasks) > 1 else name
            table.add_row(label, *("" if value is None else f"{value:.4f}" for value in values))
    return table


@runtime_checkable
class RecommendedItem(Protocol):
    """One item of an answer, as a table shows it."""

    @property
    def item(self) -> int | str: ...

    @property
    def title(self) -> str | None: ...

    @property
    def score(self) -> float: ...


def recommendations_table(title: str, answer: Sequence[RecommendedItem]) -> Table:
    """Rank, id, title and score of each recommended item."""
    caption = "every item of the history is hidden"
    table = Table("#", "item", "title", "score", title=f"recommendations: {title}", caption=caption)
    for place, item in enumerate(answer, start=1):
        table.add_row(str(place), str(item.item), item.title or "", f"{item.score:.4f}")
    return table


def draw_curves(runs: Mapping[str, Path], picture: Path, criteria: Criteria = RETRIEVAL) -> None:
    """Draws loss and `criteria.curves` over epochs; `runs` maps names to `metrics.jsonl` files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("loss", *criteria.curves)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 3.6), constrained_layout=True
    )
    records = {name: read_metrics(path) for name, path in runs.items()}
    for axis, key in zip(axes, shown, strict=True):
        for name, of_run in records.items():
            points = [(record["epoch"], record[key]) for record in of_run if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        title = "training loss" if key == "loss" else display_name(key)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
