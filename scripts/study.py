"""Trains the runs of a study, one after another or several at a time, and goes on where it was.

python -m scripts.study --study=ml1m --workdir=runs/study [--jobs=4] [--minutes=9]
    [--copies=data] [--results=experiments/results] [--only=ml1m_best_validated] [--plan]
python -m scripts.study --study=search --workdir=runs/study --jobs=4     the recipe of `ml1m_best`
python -m scripts.study --study=ranking_models --workdir=runs/study --copies=data
python -m scripts.study --study=small --workdir=runs/tiny --results=runs/tiny/results
    --override=train.epochs=1 --override=data.batch_users=32             a smoke test

`scripts/studies.py` lists the runs, the most valuable first, and `scripts/search.py` the trials of
the search. Each run is one `experiments.train` of several seeds in a process and a folder of its
own: what was killed goes on from its last checkpoint, what is finished is not trained again, and a
record is written once all seeds of a run are done. Before it starts the plan tells the minutes,
from the seconds of earlier records where there are some. --minutes ends in time with every state
saved, and starts no run that would not end.

Minutes of runs on an H200, by records of three or more runs side by side and by guesses: 168 of
`--study=ml1m`, 108 of `search`, 33 of `small`, 29 of `ranking_models`, 9 of `ranking_positions`, 37
of `ranking_softmax`, 51 of `stochastic_length`, 18 of `stream`; `--plan` says what is left. One run
of this width leaves most of a GPU idle, so that with `--jobs=4` each takes about a quarter of that;
seconds of runs that share a GPU are no measure of speed.
`scripts.ranking_counts` counts operations of ranking, `scripts.ablation` takes its pieces away, and
`scripts.generative` compares training at equal operations.
"""

import ast
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts import search
from scripts.studies import STUDIES, StudyRun
from scripts.sweep import Sweep
from ultra_hstu import progress, report

FLAGS = flags.FLAGS
SEARCH, RESULTS = "search", "experiments/results"


def main(_: list[str]) -> None:
    override = read_override(FLAGS.override)
    if override and FLAGS.results == RESULTS:
        raise ValueError(
            "--override makes other runs than those of the study, whose records would fill its "
            "tables: name another --results"
        )
    working = command.progress_console()
    sweep = Sweep(
        Path(FLAGS.workdir),
        Path(FLAGS.results),
        working,
        copies=Path(FLAGS.copies) if FLAGS.copies else None,
        platform=jax.default_backend(),
        jobs=FLAGS.jobs,
        minutes=FLAGS.minutes,
        conditions={"study": FLAGS.study, "jobs": FLAGS.jobs},
    )
    with sweep.alone():
        if FLAGS.study == SEARCH:
            left = searched(sweep, override, plan_only=FLAGS.plan)
        else:
            runs = overridden(chosen(FLAGS.study, FLAGS.only), override)
            left = sweep.plan(runs)
            if not FLAGS.plan:
                left = sweep.train(runs)
    if sweep.problems:
        listed = "\n".join(f"{name}: {problem}" for name, problem in sweep.problems.items())
        raise ValueError(f"{len(sweep.problems)} runs were not trained:\n{listed}")
    if left and not FLAGS.plan:
        report.make_console().print(f"{len(left)} runs are left: the same command goes on")


def chosen(study: str, only: Sequence[str]) -> list[StudyRun]:
    """The runs of a study, or those of these names. Raises ValueError for one that is not there."""
    runs = {run.name: run for run in STUDIES[study]()}
    for name in only:
        if name not in runs:
            raise ValueError(f"--only={name}: the study {study} has {', '.join(runs)}")
    return [run for name, run in runs.items() if name in (only or runs)]


def overridden(runs: Sequence[StudyRun], override: Mapping[str, object]) -> list[StudyRun]:
    """The runs with values of --override in place of their own."""
    return [dataclasses.replace(run, overrides={**run.overrides, **override}) for run in runs]


def read_override(given: Sequence[str]) -> dict[str, object]:
    """FIELD=VALUE, the value as Python writes it, or as a text."""
    found: dict[str, object] = {}
    for one in given:
        field, _, value = one.partition("=")
        try:
            found[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[field] = value
    return found


def searched(
    sweep: Sweep, override: Mapping[str, object], *, plan_only: bool = False
) -> list[StudyRun]:
    """Tries all candidates and what they make together, and confirms the best; runs left to do."""
    changes: dict[str, search.Changes] = {search.BASE: {}} | search.candidates()

    def runs() -> dict[str, StudyRun]:
        trials = [search.trial(name, of) for name, of in changes.items()]
        return dict(zip(changes, overridden(trials, override), strict=True))

    def trained() -> list[StudyRun]:
        left = sweep.plan(list(runs().values()))
        return left if plan_only else sweep.train(list(runs().values()))

    def records() -> dict[str, Json]:
        every = {name: sweep.record(run) for name, run in runs().items()}
        return {name: record for name, record in every.items() if record}

    if (left := trained()) or runs()[search.BASE].name in sweep.problems:
        return left
    found = {name: search.value(record) for name, record in records().items()}
    for names in search.stacks(found.pop(search.BASE), found):
        changes[" + ".join(names)] = search.together(names)
    if left := trained():
        return left
    tried = search.summary(records(), changes)
    best = tried[0]
    confirmed = overridden([search.confirmed(best["changes"])], override)
    if plan_only:
        return sweep.plan(confirmed)
    Record(sweep.results / f"{search.NAME}_search.json", **sweep.conditions).add(
        config=search.BASE,
        data=records()[search.BASE]["data"],
        protocol=search.START["train.protocol"],
        start=search.START,
        chosen=best["name"],
        changes=best["changes"],
        tried=tried,
        failed=sweep.problems,
    )
    said = f"{best['name']}, of {len(tried)} that were tried: {best['changes']}"
    progress.line(sweep.console, "chosen", said)
    return sweep.train(confirmed)


if __name__ == "__main__":
    # The sweep asks what the device is; its runs are to have the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags.DEFINE_enum("study", None, [*STUDIES, SEARCH], "what is trained", required=True)
    flags.DEFINE_string("workdir", "runs/study", "folder of all runs")
    flags.DEFINE_string("results", RESULTS, "folder of the records of finished runs")
    flags.DEFINE_string("copies", None, "folder of raw data, COPIES/ml-1m for MovieLens-1M")
    flags.DEFINE_integer("jobs", 1, "runs that are trained at one time", lower_bound=1)
    flags.DEFINE_float("minutes", None, "stop in time, with all states saved", lower_bound=1.0)
    flags.DEFINE_list("only", [], "names of runs; all of the study without it")
    flags.DEFINE_multi_string("override", [], "FIELD=VALUE of every run: a smoke test")
    flags.DEFINE_bool("plan", False, "say what would be trained and how long that takes")
    command.run(main)
