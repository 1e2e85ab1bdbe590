"""Recommends items to a user of the data, for a history given on the command line, or for a file of
requests. A ranking run scores the candidates of requests.

python -m experiments.recommend --workdir=RUN --user=42 [--k=10] [--tables=int4] [--raw_dir=PATH]
python -m experiments.recommend --workdir=RUN --history="1,1193,914"
python -m experiments.recommend --workdir=RUN --requests=FILE.jsonl > answers.jsonl

FILE may be - for standard input.

Ids are the source's own. --history needs no data, only the run's folder. A line of --requests is
what the HTTP endpoint takes, and a line of the answer what it gives
(`ultra_hstu/serving/schema.py`); a bad line is answered with {"error": why}, in its place.
"""

import sys
from typing import cast

from absl import flags

from experiments import command
from ultra_hstu import quantization, report
from ultra_hstu.quantization import HostKind
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.lines import answer_lines
from ultra_hstu.serving.scoring import RunData
from ultra_hstu.serving.service import ServingOptions, open_service

_WORKDIR, _RAW_DIR = command.define_run()
_USER = flags.DEFINE_string("user", None, "raw id of a user of the data: the whole history is used")
_HISTORY = flags.DEFINE_string("history", None, "raw item ids, oldest first, separated by commas")
_REQUESTS = command.as_path(
    flags.DEFINE_string(
        "requests", None, "file of requests, one JSON object a line; - for standard input"
    )
)
_TABLES = flags.DEFINE_enum(
    "tables", "float32", quantization.KINDS, "what the item table is served from"
)
_HOST_TABLE = flags.DEFINE_enum(
    "host_table",
    None,
    quantization.HOST_KINDS,
    "keeps the item table of a ranking run in host memory, from where each request takes its rows",
)
_K = flags.DEFINE_integer("k", 10, "how many items, of --user and --history")


def main(_: list[str]) -> None:
    if sum(flag.value is not None for flag in (_USER, _HISTORY, _REQUESTS)) != 1:
        raise ValueError("give either --user=ID or --history=ID,ID,... or --requests=FILE")
    if _REQUESTS.value is not None:
        options = ServingOptions(
            tables=_TABLES.value, host_table=cast(HostKind | None, _HOST_TABLE.value)
        )
        service = open_service(_WORKDIR.value, _RAW_DIR.value, options)
        with sys.stdin.buffer if _REQUESTS.value == "-" else open(_REQUESTS.value, "rb") as source:
            answer_lines(service, source)
        return
    if _HOST_TABLE.value is not None:
        raise ValueError("--host_table is for ranking runs, which score what --requests holds")
    model = RecommendationModel(_WORKDIR.value, tables=_TABLES.value)
    if _HISTORY.value is not None:
        wanted = [part.strip() for part in _HISTORY.value.split(",")]
        if "" in wanted:
            raise ValueError(
                f"--history={_HISTORY.value!r} has an empty place: "
                "give ids separated by single commas"
            )
        answer = model.recommend(model.catalog.encode(wanted), k=_K.value)
        title = f"after {len(wanted)} items"
    else:
        data = RunData(_WORKDIR.value, _RAW_DIR.value)
        items, times, actions = data.user(str(_USER.value))[:3]
        answer = model.recommend(items, times, actions=actions, k=_K.value)
        title = f"user {_USER.value}, after {len(items)} events"
    report.make_console().print(report.recommendations_table(title, answer))


if __name__ == "__main__":
    command.run(main)
