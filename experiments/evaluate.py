"""Evaluates the best checkpoint of a run on its test (or validation) part.

python -m experiments.evaluate --workdir=runs/ml1m_hstu [--split=validation] [--raw_dir=PATH]
"""

import dataclasses

import jax
from absl import flags

from experiments import command
from ultra_hstu import report
from ultra_hstu.evaluate import baselines, evaluator
from ultra_hstu.serving import load_params
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "which part of the data")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "where the raw data is now, if not where the run found it")


def main(_: list[str]) -> None:
    folder = Workdir(_WORKDIR.value)
    config = folder.read_config()
    if _RAW_DIR.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, raw_dir=_RAW_DIR.value))
    task = Task.load(config)
    folder.check_data(task.interactions)
    step, params = load_params(folder, task.recipe)
    with jax.default_matmul_precision(config.train.matmul_precision):
        measure = evaluator(task, _SPLIT.value)
        rows = {f"{config.name}, step {step}": measure(params), **baselines(task, _SPLIT.value)}
    title = f"{_SPLIT.value}, protocol {config.train.protocol}"
    report.make_console().print(report.metrics_table(title, rows, measure.criteria, measure.criteria.details))


if __name__ == "__main__":
    command.run(main)
