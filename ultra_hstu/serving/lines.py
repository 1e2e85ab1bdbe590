"""Requests as lines of JSON: one answer a line, in order, as they arrive."""

import io
import json
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pydantic

from ultra_hstu.serving.schema import MAX_BODY_BYTES, problem
from ultra_hstu.serving.score_service import ScoreService
from ultra_hstu.serving.service import Prepared, Service


def answer_lines(service: Service | ScoreService, source: io.BufferedIOBase) -> None:
    """One line of JSON on standard output for every line of the source, in order. Lines that are there already share a device call."""
    done = refused = 0
    for lines in arrived(source, service.model.max_users):
        read = [_prepared(service, line) for line in lines]
        good = [found for found in read if isinstance(found, Prepared)]
        answers = iter(service.answer(good) if good else [])
        for found in read:
            text = (
                next(answers).model_dump_json()
                if isinstance(found, Prepared)
                else json.dumps({"error": found})
            )
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


def arrived(source: io.BufferedIOBase, most: int) -> Iterator[list[bytes]]:
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
