"""Recommends items to a user of the data, for a history given on the command line, or for a file of requests. A ranking run scores the candidates of
requests.

python -m experiments.recommend --workdir=runs/ml1m_hstu --user=42 [--k=10] [--tables=int4] [--raw_dir=PATH]
python -m experiments.recommend --workdir=runs/ml1m_hstu --history="1,1193,914"
python -m experiments.recommend --workdir=runs/ml1m_hstu --requests=FILE.jsonl > answers.jsonl      (or - for standard input)

Ids are the source's own. --history needs no data, only the run's folder. A line of --requests is what the HTTP endpoint takes, and a line
of the answer what it gives (`ultra_hstu/serving/schema.py`, `score_schema.py`); a bad line is answered with {"error": why}, in its place.
"""

import json
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pydantic
from absl import flags

from experiments import command
from ultra_hstu import quantization, report
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.schema import MAX_BODY_BYTES, problem
from ultra_hstu.serving.score_service import ScoreService
from ultra_hstu.serving.service import Prepared, Service
from ultra_hstu.serving.services import open_service
from ultra_hstu.serving.trained import RunData

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a trained run", required=True)
_USER = flags.DEFINE_string("user", None, "raw id of a user of the data: the whole history is used")
_HISTORY = flags.DEFINE_string("history", None, "raw item ids, oldest first, separated by commas")
_REQUESTS = flags.DEFINE_string("requests", None, "file of requests, one JSON object a line; - for standard input")
_TABLES = flags.DEFINE_enum("tables", "float32", quantization.KINDS, "what the item table is served from")
_K = flags.DEFINE_integer("k", 10, "how many items, of --user and --history")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "where the raw data is now, if not where the run found it")


def main(_: list[str]) -> None:
    if sum(flag.value is not None for flag in (_USER, _HISTORY, _REQUESTS)) != 1:
        raise ValueError("give either --user=ID or --history=ID,ID,... or --requests=FILE")
    source = None if _REQUESTS.value is None else sys.stdin.buffer if _REQUESTS.value == "-" else Path(_REQUESTS.value).open("rb")
    if source is not None:
        answer_lines(open_service(_WORKDIR.value, _RAW_DIR.value, tables=_TABLES.value), source)
        return
    model = RecommendationModel(_WORKDIR.value, tables=_TABLES.value)
    if _HISTORY.value is not None:
        wanted = [part.strip() for part in _HISTORY.value.split(",")]
        if "" in wanted:
            raise ValueError(f"--history={_HISTORY.value!r} has an empty place: give ids separated by single commas")
        answer = model.recommend(model.catalog.encode(wanted), k=_K.value)
        title = f"after {len(wanted)} items"
    else:
        service = Service(model, RunData(_WORKDIR.value, _RAW_DIR.value))
        query = service.of_user(str(_USER.value), k=_K.value)
        answer = model.best(model.encode([query]), [query])[0]
        events = service.data.interactions.history(str(_USER.value))
        title = f"user {_USER.value}, after {events.stop - events.start} events"
    report.make_console().print(report.recommendations_table(title, answer))


def answer_lines(service: Service | ScoreService, source: BinaryIO) -> None:
    """One line of JSON on standard output for every line of the source, in order. Lines that are there already share a device call."""
    done = refused = 0
    for lines in arrived(source, service.model.max_users):
        read = [_prepared(service, line) for line in lines]
        good = [found for found in read if isinstance(found, Prepared)]
        answers = iter(service.answer(good) if good else [])
        for found in read:
            text = next(answers).model_dump_json() if isinstance(found, Prepared) else json.dumps({"error": found})
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
        done, refused = done + len(read), refused + len(read) - len(good)
    print(f"{done} requests, {refused} refused", file=sys.stderr)


def _prepared(service: Service | ScoreService, line: bytes) -> Prepared | str:
    if len(line) > MAX_BODY_BYTES:
        return f"a request has at most {MAX_BODY_BYTES} bytes"
    try:
        return service.prepare(service.request_type.model_validate_json(line))  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        return problem(error.errors())
    except ValueError as error:
        return str(error)


def arrived(source: BinaryIO, most: int) -> Iterator[list[bytes]]:
    """Groups of up to `most` lines: those that have arrived, at least one, so that a program may wait for each answer. Longer lines are cut."""
    lines: queue.Queue[Any] = queue.Queue(maxsize=4 * most)

    def read() -> None:
        try:
            while line := source.readline(MAX_BODY_BYTES + 1):
                rest = line
                while not rest.endswith(b"\n") and rest:
                    rest = source.readline(MAX_BODY_BYTES)
                lines.put(line)
            lines.put(None)
        except Exception as error:  # a disk that fails, say: raised where the lines are used
            lines.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        group = [lines.get()]
        while len(group) < most and group[-1] is not None and not isinstance(group[-1], Exception):
            try:
                group.append(lines.get_nowait())
            except queue.Empty:
                break
        end = group.pop() if not isinstance(group[-1], bytes) else b""
        if group:
            yield group
        if isinstance(end, Exception):
            raise end
        if end is None:
            return


if __name__ == "__main__":
    command.run(main)
