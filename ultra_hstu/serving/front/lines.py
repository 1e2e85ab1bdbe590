"""Requests as lines of JSON: one response a line, in order, as they arrive."""

import codecs
import json
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import pydantic

from ultra_hstu.serving.inputs import Query
from ultra_hstu.serving.schema import MAX_BODY_BYTES, problem
from ultra_hstu.serving.service import Service


@runtime_checkable
class Lines(Protocol):
    """A binary file or stream."""

    def readline(self, size: int, /) -> bytes: ...


def answer_lines(service: Service, source: Lines) -> None:
    """One line of JSON on standard output for every line of the source, blank ones aside, in order.
    Lines that are there already share a device call."""
    # JSON is UTF-8, whatever the encoding of standard output is.
    output = sys.stdout.buffer
    done = refused = 0
    for lines in arrived(source, service.model.max_users):
        read = [_query(service, line) for line in lines]
        good = [query for query in read if isinstance(query, Query)]
        responses = iter(service.answer(good) if good else [])
        for query in read:
            text = (
                next(responses).model_dump_json()
                if isinstance(query, Query)
                else json.dumps({"error": query})
            )
            output.write(text.encode() + b"\n")
        output.flush()
        done, refused = done + len(read), refused + len(read) - len(good)
    print(f"{done} requests, {refused} refused", file=sys.stderr)


def _query(service: Service, line: bytes) -> Query | str:
    """The query of a line, or what is wrong with it."""
    if len(line) > MAX_BODY_BYTES:
        return f"a request has at most {MAX_BODY_BYTES} bytes"
    try:
        return service.prepare(service.request_type.model_validate_json(line))
    except pydantic.ValidationError as error:
        return problem(error.errors())
    except ValueError as error:
        return str(error)


def arrived(source: Lines, most: int) -> Iterator[list[bytes]]:
    """Groups of up to `most` lines: those that have arrived, at least one, so that a program may
    wait for each response. Blank lines and a byte-order mark are left out, longer lines are cut."""
    lines: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=4 * most)

    def read() -> None:
        try:
            mark = codecs.BOM_UTF8
            while line := source.readline(MAX_BODY_BYTES + 1):
                rest = line
                while not rest.endswith(b"\n") and rest:
                    rest = source.readline(MAX_BODY_BYTES)
                line, mark = line.removeprefix(mark), b""
                if line.strip() or len(line) > MAX_BODY_BYTES:
                    lines.put(line)
            lines.put(None)
        except Exception as error:  # a disk that fails, say: raised where the lines are used
            lines.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        group: list[bytes] = []
        last = lines.get()
        while isinstance(last, bytes):
            group.append(last)
            if len(group) == most or lines.empty():
                break
            last = lines.get()
        if group:
            yield group
        if isinstance(last, Exception):
            raise last
        if last is None:
            return
