"""Reads the publishers' text files: fast where the file is clean, and naming file, line and value
where it is not.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv

MAX_ID = 2**63 - 1
MAX_SECONDS = 2**31 - 1  # batches hold times as int32 seconds
_INTEGER = re.compile(r"-?[0-9]+")


def bad_line(path: str | os.PathLike, line: int, problem: str, value: object) -> ValueError:
    """The error for one bad line; `line` counts from 1."""
    text = repr(value)
    return ValueError(
        f"{path}, line {line}: {problem}: {text if len(text) <= 200 else text[:200] + '...'}"
    )


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of a line: its name, the numpy type it is read as (None: not read), and the range
    it must lie in.
    """

    name: str
    dtype: type[np.generic] | None
    low: int | float = 0
    high: int | float = MAX_ID


def integer(
    text: str,
    path: str | os.PathLike,
    line: int,
    name: str,
    low: int | float = 0,
    high: int | float = MAX_ID,
) -> int:
    """`text` as an integer in low..high.

    Raises:
        ValueError: anything else; it names file, line and value.
    """
    if not _INTEGER.fullmatch(text.strip(" ")):
        raise bad_line(path, line, f"{name} must be a whole number", text)
    value = int(text)
    if not low <= value <= high:
        raise bad_line(path, line, f"{name} must lie in {low:g}..{high:.12g}", text)
    return value


def integers(
    text: str,
    separator: str,
    path: Path,
    line: int,
    name: str,
    low: int | float = 0,
    high: int | float = MAX_ID,
):
    """The integers of one line, int64, checked as by `integer`. Fast when all is well."""
    fields = text.split(separator)
    if re.fullmatch(rf"[0-9]{{1,18}}(?:{separator}[0-9]{{1,18}})*", text):
        values = np.array([int(field) for field in fields], np.int64)
        if low <= values.min() and values.max() <= high:
            return values
    return np.array([integer(field, path, line, name, low, high) for field in fields], np.int64)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1, decoded as UTF-8, or as latin-1 where a file
    is not UTF-8.

    MovieLens 100k and 1m are latin-1, later releases and most copies UTF-8. A latin-1 text with an
    accented letter is practically never valid UTF-8, so trying UTF-8 first reads both right.

    Raises:
        ValueError: an empty file.
    """
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield number, line.removesuffix("\r")


def read_table(
    path: Path, columns: Sequence[Column], *, delimiter: str = ",", header: bool = False
) -> dict[str, np.ndarray]:
    """The columns of a file with one record a line and no quoting, in the order of the lines,
    without blank lines.

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
        raise bad_line(path, 1, f"expected the header {_form(columns, delimiter)}", first)
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


def _form(columns: Sequence[Column], delimiter: str) -> str:
    return delimiter.join(column.name for column in columns)


def _check_end(path: Path, delimiter: str) -> None:
    """A file cut off inside the last field of its last line still parses: it is then shorter than
    all before.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read().split(b"\n")
    fields = [line.split(delimiter.encode())[-1] for line in tail]
    if (
        fields[-1]
        and len(fields) > 3
        and len(fields[-1]) < min(len(field) for field in fields[1:-1])
    ):
        with open(path, "rb") as file:
            number = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) + 1
        raise bad_line(
            path,
            number,
            "the file ends in the middle of its last line",
            tail[-1].decode("utf-8", "replace"),
        )


def _read_fast(
    path: Path, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray]:
    names: list[str] = []
    types: dict[str, pyarrow.DataType] = {}
    for i, column in enumerate(columns):
        if i and len(delimiter) == 2:  # "a::b" is a, nothing, b when split at ":"
            names.append(f"gap {i}")
            types[names[-1]] = pyarrow.null()
        names.append(column.name)
        if column.dtype is not None:
            types[column.name] = (
                pyarrow.string()
                if column.dtype is np.str_
                else pyarrow.from_numpy_dtype(column.dtype)
            )
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
    wanted = [column.name for column in columns if column.dtype is not None]
    if any(table[name].null_count for name in wanted):
        raise pyarrow.ArrowInvalid("an empty field")
    return {
        name: table[name].to_numpy().astype(str)
        if types[name] == pyarrow.string()
        else table[name].to_numpy()
        for name in wanted
    }


def _read_carefully(
    path: Path, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray]:
    """The definition of what `read_table` accepts, one line at a time."""
    values: dict[str, list] = {column.name: [] for column in columns if column.dtype is not None}
    for number, line in lines(path):
        if header and number == 1:
            continue
        fields = line.split(delimiter)
        if len(fields) != len(columns):
            problem = (
                f"expected {len(columns)} fields, {_form(columns, delimiter)}, found {len(fields)}"
            )
            raise bad_line(path, number, problem, line)
        for field, column in zip(fields, columns, strict=True):
            if column.dtype is None:
                continue
            if column.dtype is np.str_:
                if not field:
                    raise bad_line(path, number, f"{column.name} is empty", line)
                value: object = field
            elif issubclass(column.dtype, np.integer):
                value = integer(field, path, number, column.name, column.low, column.high)
            else:
                value = _decimal(field, path, number, column)
            values[column.name].append(value)
    return {
        column.name: np.array(values[column.name], column.dtype)
        for column in columns
        if column.dtype is not None
    }


def _decimal(text: str, path: Path, line: int, column: Column) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not column.low <= value <= column.high:
        raise bad_line(
            path, line, f"{column.name} must be a number in {column.low:g}..{column.high:g}", text
        )
    return value
