"""Records of measurements, and what tables and figures of them share."""

import contextlib
import contextvars
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from experiments.record import Json, read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "figures"
NOT_MEASURED = "not measured yet"
# `eval` of records that do not name it: they are older than its fields.
EVALUATION = {"hide": "window", "repeats": "hide", "time": "target"}
_LOADED: contextvars.ContextVar[dict[str, bool] | None] = contextvars.ContextVar(
    "loaded", default=None
)
KERNELS_CHANGED = "2026-11-30T13:35"  # when the code of the kernels was last changed


def load(name: str) -> Json:
    """The record of this name, empty where there is none."""
    record = read(RESULTS / f"{name}.json")
    if (loaded := _LOADED.get()) is not None:
        loaded[name] = bool(record)
    return record


@contextlib.contextmanager
def noting() -> Iterator[dict[str, bool]]:
    """Notes the names that the block loads, in their order, and whether there is such a record."""
    loaded: dict[str, bool] = {}
    token = _LOADED.set(loaded)
    try:
        yield loaded
    finally:
        _LOADED.reset(token)


def measured(*names: str, part: str = "") -> Callable[[Callable[[Json], str]], Callable[[], str]]:
    """Makes a table of a record into one that needs no argument: the first of `names` that exists.

    Args:
      part: what the record must hold; without it, as without a record, nothing is claimed.
    """

    def of_record(table: Callable[[Json], str]) -> Callable[[], str]:
        @functools.wraps(table)
        def made() -> str:
            record = first(*names)
            return table(record) if record and (not part or part in record) else NOT_MEASURED

        return made

    return of_record


def first(*names: str) -> Json:
    """The first of these records that exists."""
    return next((record for name in names if (record := load(name))), {})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> str:
    """A table, and notes below it. What has no record has no row; no rows, no table."""
    if not rows:
        return NOT_MEASURED
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    table = "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
    return "\n\n".join([table, *notes])


def cells(values: Json, *templates: str) -> list[str]:
    """What stands in a row: `cells(found, "{step_ms:.0f}", "{p50_ms:.1f} / {p99_ms:.1f}")`."""
    return [template.format(**values) for template in templates]


def evaluation(record: Json) -> dict[str, str]:
    """What `eval` said when a record, or one of its runs, was measured; `hidden` in one word."""
    found = EVALUATION | record.get("eval", {})
    return found | {"hidden": "nothing" if found["repeats"] == "rank" else found["hide"]}


def evaluated(record: Json, *names: str) -> str:
    """What these fields of `eval` said, for a note."""
    found = evaluation(record)
    return ", ".join(f"`eval.{name}={found[name]}`" for name in names)


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def mean_and_deviation(values: list[float]) -> str:
    mean = short(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {short(statistics.stdev(values))}"


def of_commit(record: Json) -> str:
    """The commit of a measurement, marked where the kernels have changed since."""
    older = (
        " (before the present kernels)"
        if record.get("date", KERNELS_CHANGED) < KERNELS_CHANGED
        else ""
    )
    return f"commit {record['commit']}{older}"


def origin(record: Json) -> str:
    return f"{record['device']}, {of_commit(record)}, {record['date']:.10}."


@contextlib.contextmanager
def figure(name: str, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw into, which is then saved under this name."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    yield drawn
    for axis in drawn.axes:
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(FIGURES / f"{name}.png", dpi=130)


# Of a figure's two files, for a light page and a dark one, whose ground is GitHub's.
GROUND = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#0d1117")
STYLES: dict[str, list[str | Json]] = {"": ["default"], "_dark": ["dark_background", GROUND]}


def themed(name: str, width: float, height: float) -> Iterator[Figure]:
    """The figure twice to draw into, for a light page and, as NAME_dark, for a dark one."""
    for ending, styles in STYLES.items():
        with matplotlib.style.context(styles), figure(f"{name}{ending}", width, height) as drawn:
            yield drawn


def picture(name: str, text: str) -> str:
    """A themed figure on a page: the one that suits its reader's theme."""
    return (
        "<picture>\n"
        f'<source media="(prefers-color-scheme: dark)" srcset="figures/{name}_dark.png">\n'
        f'<img alt="{text}" src="figures/{name}.png">\n'
        "</picture>"
    )
