"""Recommends items to a user of the data, or for a history given on the command line.

python -m experiments.recommend --workdir=runs/ml1m_hstu --user=42 [--k=10] [--tables=int4] [--raw_dir=PATH]
python -m experiments.recommend --workdir=runs/ml1m_hstu --history="1,1193,914"

Ids are the source's own. --history needs no data, only the run's folder.
"""

import dataclasses

from absl import flags

from experiments import command
from ultra_hstu import quantization, report
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run", required=True)
_USER = flags.DEFINE_string("user", None, "raw id of a user of the data: the whole history is used")
_HISTORY = flags.DEFINE_string("history", None, "raw item ids, oldest first, separated by commas")
_TABLES = flags.DEFINE_enum("tables", "float32", quantization.KINDS, "what the item table is served from")
_K = flags.DEFINE_integer("k", 10, "how many items")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "where the raw data is now, if not where the run found it")


def main(_: list[str]) -> None:
    if (_USER.value is None) == (_HISTORY.value is None):
        raise ValueError("give either --user=ID or --history=ID,ID,...")
    model = RecommendationModel(_WORKDIR.value, tables=_TABLES.value)
    if _HISTORY.value is not None:
        wanted = [part.strip() for part in _HISTORY.value.split(",")]
        if "" in wanted:
            raise ValueError(f"--history={_HISTORY.value!r} has an empty place: give ids separated by single commas")
        answer = model.recommend(model.catalog.encode(wanted), k=_K.value)
        title = f"after {len(wanted)} items"
    else:
        data = model.config.data if _RAW_DIR.value is None else dataclasses.replace(model.config.data, raw_dir=_RAW_DIR.value)
        interactions = load_interactions(data)
        Workdir(_WORKDIR.value).check_data(interactions)
        events = interactions.history(str(_USER.value))
        times = None if interactions.timestamps is None else interactions.timestamps[events]
        actions = {name: values[events] for name, values in interactions.actions.items()}
        answer = model.recommend(interactions.items[events], times, actions=actions, k=_K.value)
        title = f"user {_USER.value}, after {events.stop - events.start} events"
    report.make_console().print(report.recommendations_table(title, answer))


if __name__ == "__main__":
    command.run(main)
