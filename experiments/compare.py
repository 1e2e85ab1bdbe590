"""Compares runs: their metrics, and what differs in their configurations.

python -m experiments.compare runs/ml1m_hstu runs/ml1m_sasrec [RUN ...]

RUN is the folder of a run, or that of `train --seeds`, whose mean and standard deviation are shown.
Reads these folders alone: no data, and nothing is computed.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Column, Table

from experiments import command
from ultra_hstu import report
from ultra_hstu.criteria import RETRIEVAL, Metrics, display_name, mean_and_deviation, ranking
from ultra_hstu.fields import flat
from ultra_hstu.json_files import read_object
from ultra_hstu.starts import read_starts
from ultra_hstu.workdir import Workdir

RESULT_FIELDS = {"best": dict, "best_epoch": int}
# Kinds of tasks, by a metric that every task of the kind has.
KINDS = {"log_loss": "binary", "mse": "regression"}


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a run, or several seeds of one, hold in their folders.

    Attributes:
      config: by the whole name of a field.
      results: of the runs that are finished, as `result.json` holds them.
      data: hash of the data; None: the run has not read any.
      seconds: wall clock of all starts.
    """

    config: dict[str, Any]
    runs: int
    results: list[dict[str, Any]]
    data: str | None
    seconds: float


def main(argv: list[str]) -> None:
    if len(argv) < 3:
        raise ValueError("name at least two runs: python -m experiments.compare RUN RUN ...")
    if len(set(argv[1:])) < len(argv[1:]):
        raise ValueError("a run is named twice")
    console = report.make_console()
    runs = {path: read(Workdir(path)) for path in argv[1:]}
    console.print(metrics_table(runs))
    if all(one.results and "windows" in one.results[0] for one in runs.values()):
        console.print(windows_table(runs))
    console.print(configurations_table(runs))
    say_what_does_not_compare(console, runs)


def read(folder: Workdir) -> Compared:
    """Raises ValueError naming what is no run, or a file of one that is damaged."""
    runs = list(folder.seeds.values()) if not folder.config.exists() else []
    runs = runs or [folder]
    configs = [flat(dataclasses.asdict(run.read_config())) for run in runs]
    seeds = ", ".join(str(config["train.seed"]) for config in configs)
    finished = [run.result for run in runs if run.result.exists()]
    starts = [start for run in runs for start in read_starts(run)]
    return Compared(
        config=configs[0] | {"train.seed": seeds},
        runs=len(runs),
        results=[
            read_object(path, RESULT_FIELDS, "the same training command writes it again")
            for path in finished
        ],
        data=runs[0].read_data()["sha256"] if runs[0].data.exists() else None,
        seconds=sum(start.get("seconds", 0.0) for start in starts),
    )


def metrics_table(runs: Mapping[str, Compared]) -> Table:
    """One line a run, or one for each of its tasks; what it has not is left blank."""
    found = {name for one in runs.values() for result in one.results for name in result["best"]}
    columns = [name for name in RETRIEVAL.table if name in found]
    if tasks := _tasks(found):
        columns += ranking(tasks).table
    table = Table(_whole("test"), *map(display_name, columns), "best epoch", "minutes")
    table.box = rich.box.SIMPLE
    for name, one in runs.items():
        results = [result["best"] for result in one.results]
        epochs = ", ".join(str(result["best_epoch"]) for result in one.results)
        if len(one.results) < one.runs:
            epochs += f" ({one.runs - len(one.results)} not finished)"
        minutes = f"{one.seconds / 60:.1f}" if one.seconds else ""
        tasks = _tasks(results[0] if results else ())
        for task in tasks or [""]:
            values = [shown(results, f"{one}/{task}" if task else one) for one in columns]
            label = f"{name}: {task}" if len(tasks) > 1 else name
            table.add_row(label, *values, epochs.strip(), minutes)
    return table


def _whole(header: str) -> Column:
    """A column that is never cut short: paths of runs differ at their ends."""
    return Column(header, overflow="fold")


def _tasks(metrics: Iterable[str]) -> dict[str, str]:
    """Kinds of the tasks that have these metrics, by name: METRIC/TASK is one of a task."""
    parts = [name.split("/") for name in metrics]
    return {
        part[1]: KINDS[part[0]] for part in sorted(parts) if len(part) == 2 and part[0] in KINDS
    }


def windows_table(runs: Mapping[str, Compared]) -> Table:
    """One line a window of time: what each run reached on it before learning it."""
    found = [row["metrics"] for one in runs.values() for row in one.results[0]["windows"]]
    known = [name for name in ("ndcg@10", "ne", "mse") if any(name in one for one in found)]
    table = Table(
        "window",
        *(f"{run}: {display_name(name)}" for name in known for run in runs),
        box=rich.box.SIMPLE,
    )
    of_runs = [[result["windows"] for result in one.results] for one in runs.values()]
    for number in range(max(len(rows) for of_run in of_runs for rows in of_run)):
        rows = [[rows[number] for rows in of_run if number < len(rows)] for of_run in of_runs]
        period = next(row["period"] for of_run in rows for row in of_run)
        values = [
            shown([row["metrics"] for row in of_run], name) for name in known for of_run in rows
        ]
        if any(values):
            table.add_row(f"{number}: {period}", *values)
    return table


def shown(results: Sequence[Metrics], column: str) -> str:
    """A metric of one run, or the mean and standard deviation of several."""
    having = [{column: result[column]} for result in results if column in result]
    if len(having) < 2:
        return f"{having[0][column]:.4f}" if having else ""
    mean, deviation = mean_and_deviation(having)
    return f"{mean[column]:.4f} ± {deviation[column]:.4f}"


def configurations_table(runs: Mapping[str, Compared]) -> Table:
    """The fields that are not the same in all runs."""
    names = sorted({name for one in runs.values() for name in one.config})
    table = Table("configuration", *map(_whole, runs), box=rich.box.SIMPLE)
    for name in names:
        values = [str(one.config.get(name, "")) for one in runs.values()]
        if len(set(values)) > 1 and not name.startswith(("data.raw_dir", "data.data_dir")):
            table.add_row(name, *values)
    if not table.row_count:
        table.add_row("(all alike)", *[""] * len(runs))
    return table


def say_what_does_not_compare(console: Console, runs: Mapping[str, Compared]) -> None:
    """Metrics on other data, or measured in another way, are other numbers."""
    if len({one.data for one in runs.values() if one.data}) > 1:
        console.print("The runs were trained on different data: their metrics do not compare.")
    ways = {
        tuple(str(one.config[name]) for name in one.config if name.startswith("eval."))
        + (one.config["train.protocol"],)
        for one in runs.values()
    }
    if len(ways) > 1:
        console.print("train.protocol or eval differ: their metrics do not compare.")


if __name__ == "__main__":
    command.run(main, arguments=True)
