"""The two-minute tour: HSTU and SASRec on synthetic data, compared, drawn, asked for items.

python -m experiments.demo [--workdir=runs/demo]
"""

import shutil
from pathlib import Path

from absl import flags

from experiments import command, configs
from ultra_hstu import progress, report, tasks
from ultra_hstu.fields import changed
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

_WORKDIR = command.as_path(
    flags.DEFINE_string("workdir", "runs/demo", "folder of the two runs; emptied first")
)
_EPOCHS = flags.DEFINE_integer(
    "epochs", None, "fewer epochs than the configuration's, for a quick look"
)


def main(_: list[str]) -> None:
    console, working = report.make_console(), command.progress_console()
    root = Path(_WORKDIR.value)
    # Most targets were met before, so nothing is hidden. The test users choose no epoch.
    rules = {"eval": {"repeats": "rank"}, "train": {"protocol": "validated"}}
    hstu = changed(configs.named("synthetic"), **rules)
    if _EPOCHS.value is not None:
        hstu = changed(hstu, train={"epochs": _EPOCHS.value})
    sasrec = changed(hstu, name="synthetic_sasrec", model={"kind": "sasrec"})
    rows, folders = {}, {}
    task = tasks.load(hstu, working)
    data = task.interactions
    console.print(
        "The data is a Dirichlet process over categories whose vocabulary drifts (HSTU paper, "
        "appendix C, scaled down)"
    )
    for name, config in {"HSTU": hstu, "SASRec": sasrec}.items():
        folders[name] = Workdir(root / name.lower())
        shutil.rmtree(folders[name].path, ignore_errors=True)
        console.rule(name)
        rows[name] = train(config, folders[name].path, console=working, task=task)["best"]
    with progress.waiting(working, "result", "measuring what needs no model"):
        without_model = task.baselines("test")
    title = f"Next item among all items, test users, {report.conditions(hstu)}"
    console.print(report.metrics_table(title, rows | without_model))

    curves = root.absolute() / "curves.png"
    metrics = {name: folder.metrics for name, folder in folders.items()}
    report.draw_curves(metrics, curves, title=title, baselines=without_model)
    user = data.users[0]
    events = data.history(user)
    times = None if data.timestamps is None else data.timestamps[events]
    with progress.waiting(working, "model", "loading and compiling it to recommend"):
        model = RecommendationModel(str(folders["HSTU"].path))
        answer = model.recommend(data.items[events], times, k=5)
    title = f"user {user}, after {events.stop - events.start} events"
    console.print(report.recommendations_table(title, answer))
    for label, path in {
        "checkpoint": folders["HSTU"].checkpoints,
        "metrics": folders["HSTU"].metrics,
        "TensorBoard": folders["HSTU"].tensorboard,
        "learning curves": curves,
    }.items():
        console.print(f"{label:<16}{path}", soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
