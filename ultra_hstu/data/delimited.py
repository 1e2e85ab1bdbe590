"""Reads columns of delimited files, fast where they are clean; errors name file, line and value."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv

from ultra_hstu.data.text import MAX_ID, Line, lines


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of a line.

    Attributes:
        dtype: the numpy type that it is read as; None: it is not read.
        low, high: the range that it must lie in.
    """

    name: str
    dtype: type[np.generic] | None
    low: int | float = 0
    high: int | float = MAX_ID


def read_table(
    path: Path, columns: Sequence[Column], *, delimiter: str = ",", header: bool = False
) -> dict[str, np.ndarray]:
    """The columns of a file with one record a line, without quotes and blank lines, in its order.

    pyarrow reads clean files at more than a million lines a second. Whatever it stumbles over, and
    any value out of range, sends the file through a slow pass that names the first bad line.

    Args:
        path: the file.
        columns: every field of a line, in order; those with dtype None are skipped.
        delimiter: one character, or one character twice ("::").
        header: whether the first line holds the names of the columns.

    Raises:
        ValueError: file, line and value of the first malformed line; an empty file; a file cut off
            in its last line.
    """
    with open(path, "rb") as file:
        first = file.readline().decode("utf-8-sig", "replace").rstrip("\r\n")
        if not first.strip() or (header and not file.read(1)):
            raise ValueError(f"{path} is empty: expected lines of {_form(columns, delimiter)}")
    if header and first != delimiter.join(column.name for column in columns):
        raise Line(path, 1, first).error(f"expected the header {_form(columns, delimiter)}")
    _check_end(path, delimiter)
    try:
        table = _read_fast(path, columns, delimiter, header)
    except pyarrow.ArrowInvalid:
        return _read_carefully(path, columns, delimiter, header)
    for column in columns:
        if column.dtype is not None and column.dtype is not np.str_:
            values = table[column.name]
            if not (values.min() >= column.low and values.max() <= column.high):
                return _read_carefully(path, columns, delimiter, header)
    return table


def _value(line: Line, text: str, column: Column) -> int | float | str:
    """A field as its column says. Raises ValueError where it is not like that."""
    if column.dtype is np.str_:
        if not text:
            raise line.error(f"{column.name} is empty")
        return text
    if column.dtype is not None and issubclass(column.dtype, np.integer):
        return line.integer(text, column.name, column.low, column.high)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not column.low <= value <= column.high:
        bounds = f"{column.low:g}..{column.high:g}"
        raise line.error(f"{column.name} must be a number in {bounds}", text)
    return value


def _form(columns: Sequence[Column], delimiter: str) -> str:
    return delimiter.join(column.name for column in columns)


def _check_end(path: Path, delimiter: str) -> None:
    """Finds a file that was cut off in its last field: it parses, but the field is the shortest."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read().split(b"\n")
    fields = [line.split(delimiter.encode())[-1] for line in tail]
    earlier = [len(field) for field in fields[1:-1]]
    if fields[-1] and len(fields) > 3 and len(fields[-1]) < min(earlier):
        with open(path, "rb") as file:
            number = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) + 1
        last = Line(path, number, tail[-1].decode("utf-8", "replace"))
        raise last.error("the file ends in the middle of its last line")


def _read_fast(
    path: Path, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray]:
    read = {column.name: column.dtype for column in columns if column.dtype is not None}
    types = {name: pyarrow.from_numpy_dtype(dtype) for name, dtype in read.items()}
    names = [column.name for column in columns]
    if len(delimiter) == 2:  # "a::b" is a, nothing, b when split at ":"
        gaps = [f"gap before {name}" for name in names[1:]]
        types |= dict.fromkeys(gaps, pyarrow.null())
        names[1:] = itertools.chain(*zip(gaps, names[1:], strict=True))
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=int(header)),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter[0], quote_char=False, ignore_empty_lines=False
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=types,
            include_columns=list(types),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    if any(table[name].null_count for name in read):
        raise pyarrow.ArrowInvalid("an empty field")
    return {name: table[name].to_numpy().astype(dtype, copy=False) for name, dtype in read.items()}


def _read_carefully(
    path: Path, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray]:
    """The definition of what `read_table` accepts, one line at a time."""
    read = [column for column in columns if column.dtype is not None]
    values: dict[str, list[int | float | str]] = {column.name: [] for column in read}
    for line in lines(path):
        if header and line.number == 1:
            continue
        fields = line.text.split(delimiter)
        if len(fields) != len(columns):
            form = _form(columns, delimiter)
            raise line.error(f"expected {len(columns)} fields, {form}, found {len(fields)}")
        for field, column in zip(fields, columns, strict=True):
            if column.dtype is not None:
                values[column.name].append(_value(line, field, column))
    return {column.name: np.array(values[column.name], column.dtype) for column in read}
