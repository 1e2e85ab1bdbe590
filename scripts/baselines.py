"""What needs no model reaches on a configuration's test items; nothing is trained.

python -m scripts.baselines --config=ml1m_hstu [--config.data.raw_dir=PATH]
    [--record=experiments/results/ml1m_baselines.json]

Once for each value of `eval.hide`.
"""

from typing import get_args

from experiments import command
from experiments.record import Record
from ultra_hstu import report, tasks
from ultra_hstu.config import EvalConfig
from ultra_hstu.fields import changed

_CONFIG = command.define_config()
_RECORD = command.define_record()
HIDE = get_args(EvalConfig.__annotations__["hide"])


def main(_: list[str]) -> None:
    config = command.resolved(_CONFIG.value)
    interactions = tasks.load(config).interactions
    record = Record(_RECORD.value, config=config.name, protocol=config.train.protocol)
    runs = []
    for hide in HIDE:
        hiding = changed(config, eval={"hide": hide})
        found = tasks.of(hiding, interactions).baselines("test")
        title = f"{config.data.source}: test, {report.conditions(hiding)}"
        report.make_console().print(report.metrics_table(title, found))
        runs.append({"eval": hiding.evaluation, "baselines": found})
    record.add(runs=runs)


if __name__ == "__main__":
    command.run(main)
