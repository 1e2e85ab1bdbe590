"""The ranking runs that tables of the docs ask for, as plain data, and a loop that trains them.

python -m scripts.ranking_runs --group=models --workdir=runs/ranking
    [--results=experiments/results] [--only=ml1m_rank_din] [--list]
    [--override=train.epochs=1] [--copies=FOLDER]
python -m scripts.ranking_runs --group=models --count --results=experiments/results --copies=FOLDER

A run is a configuration with some fields changed, under three seeds. Each is one
`experiments.train` in a folder of its own: a loop that was killed goes on from the last checkpoint,
a run whose record names all its seeds is not trained again, and a record is written once they are
done. A source that cannot be had is named at the end, and the others still run. FOLDER of --copies
holds a copy of each source, named as it (`FOLDER/ml-1m`).

--count trains nothing: it writes operations and parameters of all runs of the group to the record
`rank_flops`, beside what needs no model. Minutes on an H200, predicted (`seconds` of the runs):
models 29, positions 9, softmax 41, stochastic_length 57. `scripts.ablation` takes pieces away,
`scripts.generative` compares training at equal operations.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from experiments import command, configs
from experiments.record import Record, read
from scripts.ablation import describe, task_of
from ultra_hstu import progress
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.fields import Values, changed

FLAGS = flags.FLAGS
SEEDS = (42, 43, 44)
Overrides = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class RankingRun:
    """Some seeds of a configuration.

    Attributes:
      name: of the record, and of the folder.
      config: a name of `experiments/configs`.
      overrides: values in place of the configuration's, by field: {"model.relative_bias": True}.
      seconds: what one seed takes on an H200, predicted.
    """

    name: str
    config: str
    overrides: Overrides = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    seconds: float = 60.0


# Of a seed, predicted as `scripts.ablation.predicted_seconds` does.
SECONDS = {"assistments": 25.0, "ml1m": 65.0, "synthetic": 85.0}
MODELS = [
    RankingRun(
        f"{data}_rank_{model}",
        f"{data}_rank_{model}",
        seconds=(3 if model == "din" else 1) * SECONDS[data],
    )
    for data in ("assistments", "ml1m")
    for model in ("hstu", "ultra", "din")
] + [
    RankingRun(
        f"{data}_rank_hstu_bias",
        f"{data}_rank_hstu",
        {"model.relative_bias": True},
        seconds=1.5 * SECONDS[data],
    )
    for data in ("assistments", "ml1m")
]
POSITIONS = [
    RankingRun(
        f"{data}_rank_{model}_forwards",
        f"{data}_rank_{model}",
        {"rank.positions": "forwards"},
        seconds=SECONDS[data],
    )
    for data in ("assistments", "ml1m")
    for model in ("hstu", "ultra")
]
# Beside `MODELS`: softmax in place of SiLU, and all three rows of the paper with the layer of the
# research code, whose HSTU has a relative bias.
SOFTMAX = [
    RankingRun(
        f"{data}_rank_hstu_{row}",
        f"{data}_rank_hstu",
        overrides,
        seconds=(3 if "softmax" in row else 1.5) * SECONDS[data],
    )
    for data in ("assistments", "ml1m")
    for row, overrides in (
        ("softmax", {"model.attention": "masked_softmax"}),
        ("research_bias", {"model.preset": "research", "model.relative_bias": True}),
        ("research", {"model.preset": "research"}),
        ("research_softmax", {"model.preset": "research", "model.attention": "masked_softmax"}),
    )
]
ALPHAS, LENGTHS = (1.6, 1.7, 1.8, 1.9), (1024, 2048, 3072)


def sampled(length: int, alpha: float | None, subsequence: str = "recent") -> Values:
    """Stochastic length of an HSTU on histories of at most so many events; None: whole ones."""
    of_length: Values = {"data.max_history": length, "data.stochastic_length": alpha}
    return of_length if alpha is None else {**of_length, "data.subsequence": subsequence}


def of_alpha(alpha: float | None) -> str:
    """In names: "alpha16", or "whole"."""
    return "whole" if alpha is None else f"alpha{10 * alpha:.0f}"


# Histories of 8,192 events. An epoch asks one request of each user, of 0.15 TFLOP in training where
# histories are whole; so does an evaluation.
LONG: Values = {
    "data.synthetic.length": 8192,
    "data.synthetic.users": 1000,
    "data.batch_users": 8,
    "rank.requests": "one",
    "rank.targets": 128,
    "rank.validation_fraction": 1 / 64,
    "rank.test_fraction": 1 / 64,
    "train.epochs": 16,
}
STOCHASTIC_LENGTH = [
    RankingRun(
        f"assistments_sl_{length}_{of_alpha(alpha)}",
        "assistments_rank_hstu",
        sampled(length, alpha),
        seconds=SECONDS["assistments"],
    )
    for length in LENGTHS
    for alpha in (None, *ALPHAS)
]
STOCHASTIC_LENGTH += [
    RankingRun(
        f"assistments_sl_3072_alpha16_{kind}",
        "assistments_rank_hstu",
        sampled(3072, 1.6, kind),
        seconds=SECONDS["assistments"],
    )
    for kind in ("random", "weighted")
]
STOCHASTIC_LENGTH += [
    RankingRun(
        f"synthetic_sl_8192_{of_alpha(alpha)}",
        "synthetic_rank_hstu",
        LONG | sampled(8192, alpha),
        seconds=240.0,
    )
    for alpha in (None, 1.6, 1.8)
]
GROUPS: dict[str, list[RankingRun]] = {
    "models": MODELS,
    "positions": POSITIONS,
    "softmax": SOFTMAX,
    "stochastic_length": STOCHASTIC_LENGTH,
}


def arguments(run: RankingRun, more: Overrides) -> list[str]:
    """The run as arguments of `experiments.train`."""
    overrides = {**run.overrides, **more}
    seeds = ",".join(map(str, run.seeds))
    of_fields = [f"--config.{field}={value}" for field, value in overrides.items()]
    return [f"--config={run.config}", *of_fields, f"--seeds={seeds}"]


def done(run: RankingRun, results: Path) -> bool:
    """Whether the record of the run has all its seeds, with seconds of their own."""
    record = read(results / f"{run.name}.json")
    seeds = {one["seed"] for one in record.get("runs", [])}
    return seeds >= set(run.seeds) and "shared_device" not in record


def copy_of(source: str) -> Values:
    """The field that reads the copy of --copies."""
    if not FLAGS.copies or source == "synthetic":
        return {}
    return {"data.raw_dir": str(Path(FLAGS.copies, source).absolute())}


def made(run: RankingRun, more: Overrides) -> Config:
    """The configuration of a run. Raises ValueError for a field or value that is not there."""
    config = configs.named(run.config)
    for field, value in {**run.overrides, **more}.items():
        *sections, last = field.split(".")
        values: Values = {last: value}
        for section in reversed(sections):
            values = {section: values}
        config = changed(config, **values)
    config.validate()
    return config


def count(runs: list[RankingRun], results: Path) -> None:
    """Writes operations of all runs, and the test metrics of what needs no model, by source."""
    record = Record(results / "rank_flops.json", grows=True)
    counted, baselines = record.values.get("counted", {}), record.values.get("baselines", {})
    data: dict[str, Interactions] = {}
    for run in runs:
        config = made(run, copy_of(configs.named(run.config).data.source))
        source = config.data.source
        if source not in data:
            data = {source: load_interactions(config.data)}
        task = task_of(config, data[source])
        counted[run.name] = describe(task)
        if source not in baselines:
            baselines[source] = task.baselines("test")
        record.add(counted=counted, baselines=baselines)


def main(_: list[str]) -> None:
    runs, results, console = GROUPS[FLAGS.group], Path(FLAGS.results), command.progress_console()
    names = [run.name for run in runs]
    if unknown := sorted(set(FLAGS.only) - set(names)):
        raise ValueError(f"--only has {unknown[0]!r}: the runs are {', '.join(names)}")
    if FLAGS.count:
        count(runs, results)
        return
    more = dict(given.split("=", 1) for given in FLAGS.override)
    if more and results == Path(RESULTS):
        raise ValueError("--override makes other runs than those of the tables: name --results")
    chosen = [run for run in runs if run.name in (FLAGS.only or names)]
    waiting = [run for run in chosen if not done(run, results)]
    minutes = sum(len(run.seeds) * run.seconds for run in waiting) / 60
    told = f"{len(waiting)} of {len(chosen)} runs, {minutes:.0f} min on an H200, predicted"
    progress.line(console, FLAGS.group, told)
    failed = []
    for run in waiting:
        line = arguments(run, copy_of(configs.named(run.config).data.source) | more)
        if FLAGS.list:
            progress.line(console, run.name, " ".join(line))
            continue
        folder, record = Path(FLAGS.workdir, run.name), results / f"{run.name}.json"
        whole = [sys.executable, "-m", "experiments.train", *line, f"--workdir={folder}"]
        if subprocess.run([*whole, f"--record={record}"], check=False).returncode:
            failed.append(run.name)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above; the same command goes on")


RESULTS = "experiments/results"
if __name__ == "__main__":
    flags.DEFINE_enum("group", None, sorted(GROUPS), "which runs", required=True)
    flags.DEFINE_string("workdir", "runs/ranking", "folder of the runs: NAME/seed_N")
    flags.DEFINE_string("results", RESULTS, "folder of the records")
    flags.DEFINE_list("only", [], "names of the runs to train; all without it")
    flags.DEFINE_multi_string("override", [], "FIELD=VALUE for all runs; needs another --results")
    flags.DEFINE_string(
        "copies", None, "folder with a copy of each source, read instead of a download"
    )
    flags.DEFINE_bool("count", False, "write operations and baselines, and train nothing")
    flags.DEFINE_bool(
        "list", False, "print the runs as flags of experiments.train, and train nothing"
    )
    command.run(main)
