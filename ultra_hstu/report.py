"""What a run shows: `metrics.jsonl` and TensorBoard, tables, learning curves."""

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import rich.box
from rich.console import Console
from rich.table import Table

from ultra_hstu.config import Config
from ultra_hstu.criteria import COUNTS, RETRIEVAL, Criteria, Metrics, display_name
from ultra_hstu.json_files import not_written, parse_object, write_text
from ultra_hstu.trackers import Guarded, TensorBoard, Tracker

_LINES = ("-", "--", "-.", ":")  # of what needs no model
_REPEATS = (
    "REPEATS: share of the targets whose item the user has met before. "
    "With eval.repeats=hide these are never found."
)
_NE = "NE: log loss over that of the best constant prediction; low is good."
RECORD_FIELDS = {"step": int}  # of every line of `metrics.jsonl`

log = logging.getLogger(__name__)


class MetricLog:
    """Appends records to `metrics.jsonl`, and gives their numbers to TensorBoard and to trackers.

    Records after `resume_step` are dropped, since they come again. A warning names damaged ones,
    which are dropped too.
    """

    def __init__(
        self,
        path: Path,
        tensorboard: Path,
        config: dict[str, Any] | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        resume_step: int = 0,
    ):
        if path.exists():
            kept = []
            for number, line in enumerate(_lines(path), start=1):
                try:
                    if parse_object(line, RECORD_FIELDS, number)["step"] <= resume_step:
                        kept.append(line.decode() + "\n")
                except ValueError as error:
                    log.warning("%s, %s: this record is dropped", path, error)
            write_text(path, "".join(kept))
        self._file = open(path, "a")
        board = TensorBoard(tensorboard, resume_step=resume_step)
        self._trackers: list[Tracker] = [board, *map(Guarded, trackers)]
        if config is not None:
            for tracker in self._trackers:
                tracker.config(config)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Raises OSError naming the file that could not be written."""
        values = {name: one for name, one in record.items() if isinstance(one, int | float)}
        try:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.log(step, values)
        except OSError as error:
            raise not_written(self._file.name, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write that met it
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without the torn last one of a killed run."""
    *whole, _ = path.read_bytes().split(b"\n")
    yield from whole


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run. Raises ValueError naming file and line of a damaged one."""
    try:
        return [
            parse_object(line, RECORD_FIELDS, number)
            for number, line in enumerate(_lines(path), start=1)
        ]
    except ValueError as error:
        raise ValueError(f"{path}, {error}: delete this line") from None


class _Output(Console):
    """Standard output. A closed one is an error like any other: Rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console(*, quiet: bool = False) -> Console:
    """Standard output; wide enough for the tables where it is a file or a pipe.

    `quiet` prints nothing.
    """
    return _Output(quiet=quiet, width=None if sys.stdout.isatty() else 120)


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
    if "repeats" in columns and any(metrics.get("repeats") for metrics in rows.values()):
        table.caption = _REPEATS
    elif "ne" in columns and not set(columns) & set(COUNTS):  # else the table before has said it
        table.caption = _NE
    for name, metrics in rows.items():
        for task in criteria.tasks or ("",):
            values = [metrics.get(f"{column}/{task}" if task else column) for column in columns]
            label = f"{name}: {task}" if len(criteria.tasks) > 1 else name
            table.add_row(label, *map(_cell, columns, values))
    return table


def _cell(column: str, value: float | None) -> str:
    """A metric, or a count of what it was measured on; blank for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if column in COUNTS else f"{value:.4f}"


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


def draw_curves(
    runs: Mapping[str, Path],
    picture: Path,
    criteria: Criteria = RETRIEVAL,
    *,
    title: str = "",
    baselines: Mapping[str, Metrics] | None = None,
) -> None:
    """Draws loss and `criteria.curves` over epochs, the best epoch of each run marked.

    Args:
      runs: `metrics.jsonl` files, by the name of the run.
      title: what was measured, and how.
      baselines: metrics of what needs no model, drawn as lines across.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    shown = ("loss", *criteria.curves)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.4 * len(shown), 4.4), layout="constrained"
    )
    records = {name: read_metrics(path) for name, path in runs.items()}
    for axis, key in zip(axes, shown, strict=True):
        for number, (name, of_run) in enumerate(records.items()):
            points = _points(of_run, key)
            if not points:
                continue
            line = {"color": f"C{number}", "marker": "o", "markersize": 3, "label": name}
            axis.plot(*zip(*points.items(), strict=True), **line)
            best = best_epoch(of_run, criteria)
            if key != "loss" and best in points:
                place = (best, points[best])
                axis.plot(*place, "o", color=f"C{number}", markersize=10, fillstyle="none")
                text = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                label = f"epoch {best}: {points[best]:.4f}"
                axis.annotate(label, place, color=f"C{number}", fontsize=8, bbox=box, **text)
        for number, (name, metrics) in enumerate((baselines or {}).items()):
            if (value := metrics.get(key)) is not None:
                style = {"color": "0.4", "linewidth": 1, "linestyle": _LINES[number % len(_LINES)]}
                axis.axhline(value, label=f"{name} (no model)", **style)
        axis.set(title="training loss" if key == "loss" else display_name(key), xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.margins(x=0.15, y=0.12)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[-1].get_legend_handles_labels()
    ring = Line2D([], [], color="0.2", marker="o", markersize=10, fillstyle="none", linestyle="")
    figure.legend(
        [*handles, ring],
        [*labels, f"best epoch, by {display_name(criteria.selection)}"],
        frameon=False,
        loc="outside lower center",
        ncols=4,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_windows(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    picture: Path,
    criteria: Criteria = RETRIEVAL,
    *,
    title: str = "",
) -> None:
    """Draws `criteria.curves` over windows, the events of each window behind them.

    Args:
      runs: the rows of `result.json` under protocol `windows`, by the name of the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    keys = criteria.curves
    figure, axes = plt.subplots(
        1, len(keys), figsize=(6 * len(keys), 4.2), layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[0], keys, strict=True):
        behind = axis.twinx()
        rows = next(iter(runs.values()))
        bars = {row["window"]: row["events"] for row in rows if row["metrics"]}
        behind.bar(list(bars), list(bars.values()), color="0.9", label="events")
        behind.set(ylabel="events of the window")
        behind.spines[["top"]].set_visible(False)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
        for number, (name, of_run) in enumerate(runs.items()):
            points = {row["window"]: row["metrics"].get(key) for row in of_run if row["metrics"]}
            line = {"color": f"C{number}", "marker": "o", "markersize": 3, "label": name}
            axis.plot(list(points), list(points.values()), **line)
        axis.set(title=f"{display_name(key)} before a window is learned", xlabel="window")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def windows_table(title: str, rows: Sequence[Mapping[str, Any]], criteria: Criteria) -> Table:
    """One line a window: its events, and how the model of the one before did on it."""
    names = ["period", "events", "users", "new users", "new items", "targets", "steps"]
    shown = criteria.curves
    table = Table("window", *names, *map(display_name, shown), title=title, box=rich.box.SIMPLE)
    for row in rows:
        counts = [row[name.replace(" ", "_")] for name in names]
        cells = [one if isinstance(one, str) else f"{one:,}" for one in counts]
        metrics = [row["metrics"].get(name) for name in shown]
        table.add_row(
            str(row["window"]), *cells, *("" if one is None else f"{one:.4f}" for one in metrics)
        )
    return table


def _points(records: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """The values of a metric by epoch, where both are numbers."""
    pairs = [(record.get("epoch"), record.get(key)) for record in records]
    return {
        epoch: float(value)
        for epoch, value in pairs
        if isinstance(epoch, int) and isinstance(value, int | float)
    }


def best_epoch(records: Sequence[Mapping[str, Any]], criteria: Criteria) -> int | None:
    """The epoch that does best by the metric that decides; None: none was evaluated."""
    best = None
    points = _points(records, criteria.selection)
    for epoch, value in points.items():
        if criteria.better(value, None if best is None else points[best]):
            best = epoch
    return best
