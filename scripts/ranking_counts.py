"""Counts operations and parameters of the ranking studies, beside what needs no model.

python -m scripts.ranking_counts --record=experiments/results/rank_flops.json
    [--studies=ranking_models,ranking_softmax] [--copies=data]

Nothing is trained: minutes on a CPU. A study adds to what the record holds of others.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import command
from experiments.record import Record
from scripts.ablation import describe, task_of
from scripts.studies import RANKING, StudyRun
from scripts.sweep import copy_of
from ultra_hstu import progress
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.fields import changed

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    if unknown := sorted(set(FLAGS.studies) - set(RANKING)):
        raise ValueError(f"--studies: there is no {unknown[0]!r}; use {', '.join(RANKING)}")
    console, record = command.progress_console(), Record(FLAGS.record, grows=True)
    copies = Path(FLAGS.copies) if FLAGS.copies else None
    for name in FLAGS.studies:
        runs = RANKING[name]()
        count(runs, record, copies)
        progress.line(console, name, f"{len(runs)} runs are counted")


def count(runs: Sequence[StudyRun], record: Record, copies: Path | None) -> None:
    """Adds operations of all runs, and the test metrics of what needs no model, by source."""
    counted, baselines = record.values.get("counted", {}), record.values.get("baselines", {})
    data: dict[str, Interactions] = {}
    for run in runs:
        config = run.made()
        source = config.data.source
        if copy := copy_of(source, copies):
            config = changed(config, data={"raw_dir": str(copy.absolute())})
        if source not in data:
            data = {source: load_interactions(config.data)}
        task = task_of(config, data[source])
        counted[run.name] = describe(task)
        if source not in baselines:
            baselines[source] = task.baselines("test")
        record.add(counted=counted, baselines=baselines)


if __name__ == "__main__":
    flags.DEFINE_list("studies", [*RANKING], "which ranking studies of scripts.studies")
    command.as_path(flags.DEFINE_string("copies", None, "folder of raw data, COPIES/SOURCE"))
    command.define_record()
    command.run(main)
