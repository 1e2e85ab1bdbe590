"""Measures a model that goes on against one that is trained anew for every window.

python -m scripts.windows --config=ml1m_hstu --config.train.protocol=windows
    --config.windows.first=8 --config.windows.count=11 --config.train.epochs=12
    --workdir=runs/windows --seeds=42,43,44
    --record=experiments/results/windows_ml1m.json [--fraction=0.1] [--only=anew] [--picture=PATH]

Both are judged by every window before they learn it. One is trained anew on all events up to the
window's end, `train.epochs` epochs; the other continues, with `--fraction` of the steps that the
first takes for the newest window. Runs that are done already in --workdir are not trained again,
and one that was killed goes on; with --only the others are read alone.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import report, tasks
from ultra_hstu.config import Config
from ultra_hstu.criteria import Criteria
from ultra_hstu.data.windows import windows
from ultra_hstu.fields import changed
from ultra_hstu.json_files import read_object
from ultra_hstu.task import Task
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

ANEW, CONTINUED = "anew", "continued"
_CONFIG = command.define_config()
_WORKDIR = command.as_path(
    flags.DEFINE_string("workdir", None, "folder of all runs", required=True)
)
_SEEDS = flags.DEFINE_list("seeds", ["42", "43", "44"], "one run of either kind for each")
_FRACTION = flags.DEFINE_float(
    "fraction", 0.1, "training steps of the one that continues, of those of the other", 0.0, 1.0
)
_ONLY = flags.DEFINE_list("only", [CONTINUED, ANEW], "which of the two are trained")
_PICTURE = command.as_path(flags.DEFINE_string("picture", None, "file of the figure"))
_RECORD = command.define_record()


def main(_: list[str]) -> None:
    config = command.resolved(_CONFIG.value)
    if config.train.protocol != "windows":
        raise ValueError("set --config.train.protocol=windows")
    working = command.progress_console()
    task = tasks.load(config, working)
    anew = changed(config, windows={"start": ANEW, "steps": None})
    steps = max(1, math.floor(_FRACTION.value * steps_of_newest(anew, task)))
    arms = {CONTINUED: changed(config, windows={"start": CONTINUED, "steps": steps}), ANEW: anew}
    found: dict[str, list[Json]] = {}
    for arm, of_arm in arms.items():
        for seed in map(int, _SEEDS.value):
            folder = Path(_WORKDIR.value) / arm / f"seed_{seed}"
            result = trained(changed(of_arm, train={"seed": seed}), folder, task, working, arm)
            if result is not None:
                found.setdefault(arm, []).append(result)
    record = Record(
        _RECORD.value, config=config.name, eval=config.evaluation, fraction=_FRACTION.value
    )
    console, criteria = report.make_console(), task.criteria
    for arm, results in found.items():
        title = f"{config.name}, {arm}, seed {results[0]['seed']}"
        console.print(report.windows_table(title, results[0]["windows"], criteria))
    seeds = len(_SEEDS.value)
    if seeds < 2 or len(found) < len(arms) or any(len(one) < seeds for one in found.values()):
        console.print("nothing is compared: that takes both, of two seeds at least")
        return
    compared = compare(found, criteria)
    for name, values in compared["metrics"].items():
        console.print(f"{name}: {values}")
    record.add(
        data=config.data.source,
        by=config.windows.by,
        size=config.windows.size,
        targets=config.windows.targets,
        epochs=config.train.epochs,
        **compared,
    )
    if _PICTURE.value:
        rows = {arm: mean_rows([one["windows"] for one in of]) for arm, of in found.items()}
        title = f"{config.name}, mean of {len(_SEEDS.value)} seeds, {report.conditions(config)}"
        report.draw_windows(rows, Path(_PICTURE.value), criteria, title=title)


def steps_of_newest(anew: Config, task: Task) -> int:
    """Steps of training anew for the newest window, on all events."""
    newest = windows(task.interactions, anew.windows)[-1]
    whole = tasks.of_window(anew, task.interactions, newest, roomy=True)
    loader = whole.loader(
        "train",
        batch_users=anew.data.batch_users,
        steps_per_call=anew.train.steps_per_call,
    )
    return anew.train.epochs * len(loader.plan())


def trained(config: Config, folder: Path, task: Task, console: Console, arm: str) -> Json | None:
    """The result of a run; of one that --only leaves out, if it is finished."""
    finished = Workdir(folder).result
    if arm in _ONLY.value:
        return train(config, folder, console=console, task=task)
    if not finished.exists():
        return None
    result = read_object(finished, {"windows": list}, "delete it")
    # It is written after every window; the last one ends the run.
    whole = len(result["windows"]) == len(windows(task.interactions, config.windows))
    return result if whole else None


def mean_rows(runs: Sequence[Sequence[Json]]) -> list[Json]:
    """The rows of several seeds as one, with the means of their metrics."""
    return [
        of_seeds[0]
        | {
            "metrics": {
                name: statistics.mean(row["metrics"][name] for row in of_seeds)
                for name in of_seeds[0]["metrics"]
            }
        }
        for of_seeds in zip(*runs, strict=True)
    ]


def compare(found: Mapping[str, Sequence[Json]], criteria: Criteria) -> Json:
    """What either kind reaches over all windows, and how many standard errors lie between them."""
    metrics: Json = {}
    for name in criteria.curves:
        of_arms = {arm: [one["best"][name] for one in runs] for arm, runs in found.items()}
        means = {arm: statistics.mean(values) for arm, values in of_arms.items()}
        # Seeds give pairs: both runs of a seed share its first window.
        pairs = [b - a for a, b in zip(of_arms[ANEW], of_arms[CONTINUED], strict=True)]
        # Of a mean over targets, beside that over seeds.
        targets = sum(row["targets"] for row in found[ANEW][0]["windows"])
        error = math.sqrt(
            sum(statistics.variance(values) / len(values) for values in of_arms.values())
        )
        metrics[name] = {
            **{f"{arm}": values for arm, values in of_arms.items()},
            **{f"mean_{arm}": value for arm, value in means.items()},
            "difference": means[CONTINUED] - means[ANEW],
            "standard_error": error,
            "difference_by_seed": pairs,
            "targets": targets,
        }
    of_windows = {
        arm: [
            {name: row[name] for name in row if name != "metrics"}
            | {name: row["metrics"].get(name) for name in criteria.curves}
            for row in mean_rows([one["windows"] for one in runs])
        ]
        for arm, runs in found.items()
    }
    steps = {arm: rows[-1]["steps"] for arm, rows in of_windows.items()}
    return {
        "seeds": [one["seed"] for one in found[ANEW]],
        "metrics": metrics,
        "steps_of_newest": steps,
        "share_of_steps": steps[CONTINUED] / steps[ANEW],
        "windows": of_windows,
    }


if __name__ == "__main__":
    command.run(main)
