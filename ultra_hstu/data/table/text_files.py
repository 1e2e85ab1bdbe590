"""Text files of own events as bytes, as text, and as records of CSV."""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from ultra_hstu.data.text import Line

# Behind a problem that an open quote may be the cause of.
QUOTES = "is a quote left open? If quotes are a part of the text: --config.data.table.quotes=False"


def open_raw(path: Path, compression: str | None) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=compression)


@contextlib.contextmanager
def open_text(path: Path, compression: str | None) -> Iterator[io.TextIOWrapper]:
    """The file as text; a byte that is not UTF-8 is a ValueError that names its line."""
    with open_raw(path, compression) as stream:
        text = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="")
        try:
            yield text
        except UnicodeDecodeError:
            with open_raw(path, compression) as again:
                for number, line in enumerate(io.BufferedReader(again), 1):
                    try:
                        line.decode("utf-8")
                    except UnicodeDecodeError as error:
                        problem = f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                        problem += " (iconv -f ISO-8859-1 -t UTF-8, if that is what it is)"
                        text_of = line.decode("utf-8", "replace")
                        raise Line(path, number, text_of).error(problem) from None
            raise
        finally:
            text.detach()


def csv_records(
    path: Path, file: Iterable[str], delimiter: str, quotes: bool
) -> Iterator[tuple[Line, Sequence[str]]]:
    """The records of CSV, blank lines left out, with the line that each begins on."""
    kind: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(file, delimiter=delimiter, strict=True, quoting=kind)
    number = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{error}; {QUOTES}"
            raise Line(path, number, "").error(problem) from None
        if fields:
            yield Line(path, number, delimiter.join(fields)), fields
        number = reader.line_num + 1
