"""Evaluates the best checkpoint of a run on its test (or validation) items.

python -m experiments.evaluate --workdir=runs/ml1m_hstu [--split=validation] [--raw_dir=PATH]
"""

import dataclasses

import jax
from absl import flags

from experiments import command
from ultra_hstu import report
from ultra_hstu.evaluate import Evaluator, popularity_metrics
from ultra_hstu.serving import load_params
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "which items to rank")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "where the raw data is now, if not where the run found it")

COLUMNS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")


def main(_: list[str]) -> None:
    folder = Workdir(_WORKDIR.value)
    config = folder.read_config()
    if _RAW_DIR.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, raw_dir=_RAW_DIR.value))
    task = Task.load(config)
    folder.check_data(task.interactions)
    step, params = load_params(folder, task.recipe)
    with jax.default_matmul_precision(config.train.matmul_precision):
        rows = {f"{config.name}, step {step}": Evaluator(task, _SPLIT.value)(params), "popularity": popularity_metrics(task, _SPLIT.value)}
    report.make_console().print(report.metrics_table(f"{_SPLIT.value}, protocol {config.train.protocol}", rows, COLUMNS))


if __name__ == "__main__":
    command.run(main)
