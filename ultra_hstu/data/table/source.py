"""What a table of rows is, whether it lies in a file or in memory."""

import ast
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa

from ultra_hstu.data.text import Line, open_binary

Types = Mapping[str, pa.DataType]
Record = Mapping[str, object]
_ROWS = 1 << 16  # that are held as Python objects


@runtime_checkable
class TableSource(Protocol):
    """Rows with named columns. `str` of it is its name, for messages."""

    @property
    def types(self) -> Types:
        """Of every column, by name."""

    @property
    def documented(self) -> Mapping[str, tuple[str, ...]]:
        """The values that a column of text can have, where a publisher says which."""

    def batches(self, wanted: Types) -> Iterable[pa.RecordBatch]:
        """The rows with these columns. A column with several values an entry is a list of text.

        Raises ValueError that says where a row is malformed.
        """

    def place(self, row: int) -> str:
        """Where a row is, counted from 0 as `batches` gives them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A table in memory."""

    table: pa.Table

    @property
    def types(self) -> Types:
        return {field.name: field.type for field in self.table.schema}

    @property
    def documented(self) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Types) -> Iterable[pa.RecordBatch]:
        return self.table.select(list(wanted)).to_batches(max_chunksize=1 << 20)

    def place(self, row: int) -> str:
        return f"row {row} of the frame"

    def __str__(self) -> str:
        return "the frame"


@dataclasses.dataclass(frozen=True, eq=False)
class RecordFile:
    """A file whose records Python reads: slow, and able to read anything.

    Attributes:
        read: the records of the file, each with its line, by name; a name that a record lacks has
            no value there. Raises ValueError.
    """

    path: Path
    types: Types
    read: Callable[[Path], Iterator[tuple[Line, Record]]]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def documented(self) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Types) -> Iterator[pa.RecordBatch]:
        for some in itertools.batched(self.read(self.path), _ROWS):
            arrays = [pa.array([one.get(n) for _, one in some], self.types[n]) for n in wanted]
            yield pa.RecordBatch.from_arrays(arrays, list(wanted))

    def place(self, row: int) -> str:
        line, _ = next(itertools.islice(self.read(self.path), row, None))
        return f"{line.path}, line {line.number}"


@dataclasses.dataclass(frozen=True, eq=False)
class Renamed:
    """A source whose columns have other names here.

    Attributes:
        names: the name in the source, by the name here; other columns keep theirs.
    """

    source: TableSource
    names: Mapping[str, str]

    def __str__(self) -> str:
        return str(self.source)

    @property
    def types(self) -> Types:
        here = {name: new for new, name in self.names.items()}
        return {here.get(name, name): kind for name, kind in self.source.types.items()}

    @property
    def documented(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Types) -> Iterator[pa.RecordBatch]:
        there = {self.names.get(name, name): kind for name, kind in wanted.items()}
        for batch in self.source.batches(there):
            yield batch.rename_columns(list(wanted))

    def place(self, row: int) -> str:
        return self.source.place(row)


# --- lines ---


def text_lines(path: Path) -> Iterator[Line]:
    """The lines of a file in UTF-8 that are not blank, without looking through it first."""
    with open_binary(path) as file:
        for number, data in enumerate(file, 1):
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                text = data.decode("utf-8", "replace")
                problem = f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                raise Line(path, number, text).error(problem) from None
            if text.strip():
                yield Line(path, number, text)


def head(path: Path) -> list[str]:
    """About a thousand lines at the beginning of a file, whatever they are."""
    with open_binary(path) as file:
        return file.read(1 << 18).decode("utf-8-sig", "replace").splitlines()[:1000]


def json_object(line: Line) -> dict[str, object]:
    """The JSON object of a line."""
    try:
        value = json.loads(line.text)
    except json.JSONDecodeError as error:
        problem = f"expected one JSON object a line ({error.msg}, column {error.colno})"
        raise line.error(problem) from None
    if not isinstance(value, dict):
        raise line.error("expected one JSON object a line")
    return value


def literal(line: Line) -> dict[str, object]:
    """The dict of a line of Python."""
    try:
        value = ast.literal_eval(line.text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise line.error("expected one dict a line, written as Python does")
    return value
