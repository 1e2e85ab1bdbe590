"""Recommends items to a user of the data, for a history given on the command line, or for a file of
requests. A ranking run scores the candidates of requests.

python -m experiments.recommend --workdir=RUN --user=42 [--k=10] [--tables=int4] [--raw_dir=PATH]
python -m experiments.recommend --workdir=RUN --history="1,1193,914"
python -m experiments.recommend --workdir=RUN --title="blue mug" [--title="red mug"]
python -m experiments.recommend --workdir=RUN --user=42 --candidates="608,2858"     # ranking
python -m experiments.recommend --workdir=RUN --requests=FILE.jsonl > answers.jsonl

FILE may be - for standard input.

Ids are the source's own. --history and --title need no data, only the run's folder; titles stand
behind the history, and a part of one is enough where it means one item. --candidates prints what a
ranking run answers to such a request. A line of --requests is what the HTTP endpoint takes, and a
line of the answer what it gives (`ultra_hstu/serving/schema.py`); a bad line is answered with
{"error": why}, in its place.
"""

import io
import json
import sys
from typing import IO, cast

from absl import flags

from experiments import command
from ultra_hstu import progress, report
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.quantization import HostKind
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.front.lines import answer_lines
from ultra_hstu.serving.options import ServingOptions
from ultra_hstu.serving.scoring import RunData
from ultra_hstu.serving.service import open_service

_WORKDIR, _RAW_DIR = command.define_run()
_USER = flags.DEFINE_string("user", None, "raw id of a user of the data: the whole history is used")
_HISTORY = flags.DEFINE_string("history", None, "raw item ids, oldest first, separated by commas")
_TITLES = flags.DEFINE_multi_string(
    "title", [], "title of an item of the history, or a part of it; the flag may come again"
)
_CANDIDATES = flags.DEFINE_string(
    "candidates", None, "raw item ids that a ranking run scores, separated by commas"
)
_REQUESTS = command.as_path(
    flags.DEFINE_string(
        "requests", None, "file of requests, one JSON object a line; - for standard input"
    )
)
_TABLES, _HOST_TABLE = command.define_tables()
_K = flags.DEFINE_integer("k", 10, "how many items, of --user and --history")


def main(_: list[str]) -> None:
    history = _HISTORY.value is not None or bool(_TITLES.value)
    if (_USER.value is not None) + history + (_REQUESTS.value is not None) != 1:
        raise ValueError(
            "give either --user=ID, or --history=ID,ID,... and --title=TITLE, or --requests=FILE"
        )
    working = command.progress_console(stderr=True)
    if _REQUESTS.value is not None or _CANDIDATES.value is not None:
        options = ServingOptions(
            tables=_TABLES.value, host_table=cast(HostKind | None, _HOST_TABLE.value)
        )
        with progress.waiting(working, "model", f"loading {_WORKDIR.value}") as came:
            service = open_service(_WORKDIR.value, _RAW_DIR.value, options)
            came("loaded; it compiles with the first requests")
        with _requests(service.catalog) as source:
            with progress.waiting(working, "requests", "answering", clock=False):
                answer_lines(service, source)
        return
    if _HOST_TABLE.value is not None:
        raise ValueError("--host_table is for ranking runs, which score what --requests holds")
    with progress.waiting(working, "model", f"loading {_WORKDIR.value} and compiling") as came:
        model = RecommendationModel(_WORKDIR.value, tables=_TABLES.value)
        if history:
            wanted = _history(model.catalog)
            answer = model.recommend(model.catalog.encode(wanted), k=_K.value)
            title = f"after {len(wanted)} items"
        else:
            data = RunData(_WORKDIR.value, _RAW_DIR.value)
            user = str(_USER.value)
            items, times, actions, context = data.user(user)
            answer = model.recommend(
                items, times, actions=actions, context=context, k=_K.value, user=user
            )
            title = f"user {_USER.value}, after {len(items)} events"
        came("loaded and compiled, and the items ranked")
    report.make_console().print(report.recommendations_table(title, answer))


def _requests(catalog: Catalog) -> IO[bytes]:
    """What --requests holds, or the one request about --candidates."""
    if _CANDIDATES.value is None:
        return sys.stdin.buffer if _REQUESTS.value == "-" else open(str(_REQUESTS.value), "rb")
    if _REQUESTS.value is not None:
        raise ValueError("--candidates and --requests: the lines of a file name their own")
    request: dict[str, object] = {"candidates": _ids("candidates", _CANDIDATES.value)}
    if _USER.value is not None:
        request["user"] = _USER.value
    else:
        request["history"] = _history(catalog)
    return io.BytesIO(json.dumps(request).encode())


def _history(catalog: Catalog) -> list[int | str]:
    """Raw ids of --history, and of the items that --title means."""
    given: list[int | str] = []
    if _HISTORY.value is not None:
        given += _ids("history", _HISTORY.value)
    return given + [catalog.by_title(title) for title in _TITLES.value]


def _ids(name: str, value: str) -> list[str]:
    wanted = [part.strip() for part in value.split(",")]
    if "" in wanted:
        raise ValueError(
            f"--{name}={value!r} has an empty place: give ids separated by single commas"
        )
    return wanted


if __name__ == "__main__":
    command.run(main)
