"""Reads columns of delimited files, fast where they are clean; errors name file, line and value."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv

from ultra_hstu.data.strings import STRINGS
from ultra_hstu.data.text import (
    BLANKS,
    CONTROL,
    MAX_ID,
    MAX_ID_LENGTH,
    Line,
    TextFile,
    examine,
    lines,
    records,
)
from ultra_hstu.data.times import Unit, check_times

_log = logging.getLogger(__name__)
_ROWS = 1 << 16  # that the careful pass holds as Python objects
# pyarrow takes hexadecimal integers, and text behind a closing quote.
_HEXADECIMAL = re.compile(rb"(?:^|[\s,:])-?0[xX]")


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of a line.

    Attributes:
        dtype: the NumPy type that it is read as; None: it is not read.
        low, high: the range that a number must lie in.
        unit: of a time; its range then follows from the unit.
    """

    name: str
    dtype: type[np.generic] | None
    low: int | float = 0
    high: int | float = MAX_ID
    unit: Unit | None = None

    @staticmethod
    def time(name: str, unit: Unit) -> "Column":
        """A column of times, checked by their range in this unit."""
        return Column(name, np.int64, -MAX_ID, MAX_ID, unit)


def read_table(
    path: Path, columns: Sequence[Column], *, delimiter: str = ",", header: bool = False
) -> dict[str, np.ndarray]:
    """The columns of a file with one record a line.

    pyarrow reads clean files at more than a million lines a second. Whatever it stumbles over, and
    any value out of range, sends the file through a slow pass that names the first bad line.

    Args:
        path: the file.
        columns: every field of a line, in order; those with dtype None are skipped.
        delimiter: one character, or one character twice ("::"). Fields may stand in quotes where it
            is a comma.
        header: whether the first line holds the names of the columns, in any order.

    Returns:
        by name, in the order of `columns`, arrays of their types; strings have the dtype STRINGS.

    Raises:
        ValueError: file, line and value of the first malformed line; times in another unit; an
            empty file, and one that is not text.
    """
    file = examine(path)
    form = delimiter.join(column.name for column in columns)
    in_file = columns
    if header:
        line, names = next(_records(file, delimiter))
        by_name = {column.name: column for column in columns}
        if sorted(names) != sorted(by_name):
            raise line.error(f"expected the header {form}")
        in_file = [by_name[name] for name in names]
    table = _read_fast(file, in_file, delimiter, header)
    if table is None:
        table = _read_carefully(file, in_file, delimiter, header)
    if not all(len(values) for values in table.values()):
        raise ValueError(f"{path} is empty: expected lines of {form}")
    first = 2 if header else 1
    for column in columns:
        if column.unit is not None:
            values = table[column.name]
            check_times(values, column.unit, _place(path, first, column.name))
    if not file.newline and in_file[-1].dtype is not None:
        _warn_of_a_cut(path, delimiter)
    return {column.name: table[column.name] for column in columns if column.dtype is not None}


def _place(path: Path, first: int, name: str) -> Callable[[int], str]:
    return lambda row: f"{path}, line {first + row}: {name}"


def _warn_of_a_cut(path: Path, delimiter: str) -> None:
    """Warns of a file without a newline at its end whose last field is the shortest.

    It may have been cut off within that field.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read().splitlines()
    *earlier, last = (line.split(delimiter.encode())[-1] for line in tail)
    # The first of them may have been cut here.
    if len(earlier) > 1 and len(last) < min(len(field) for field in earlier[1:]):
        _log.warning(
            "%s has no newline at its end, and its last field, %r, is shorter than all before it: "
            "was the file cut off?",
            path,
            last.decode("utf-8", "replace"),
        )


def _read_fast(
    file: TextFile, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray] | None:
    """None for a file that only the careful pass can judge."""
    read = {column.name: column for column in columns if column.dtype is not None}
    types = {name: _arrow_type(column) for name, column in read.items()}
    names = [column.name for column in columns]
    if not _is_plain(file.path, delimiter):
        return None
    if len(delimiter) == 2:  # "a::b" is a, nothing, b when split at ":"
        gaps = [f"gap before {name}" for name in names[1:]]
        types |= dict.fromkeys(gaps, pyarrow.null())
        names[1:] = itertools.chain(*zip(gaps, names[1:], strict=True))
    try:
        table = pyarrow.csv.read_csv(
            file.path if not file.blank_lines else _head(file),
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
    except pyarrow.ArrowInvalid:
        return None
    values: dict[str, np.ndarray] = {}
    for name, column in read.items():
        arrow = table[name]
        table = table.drop_columns(name)  # its memory is free when it has been converted
        converted = None if arrow.null_count else _converted(arrow, column)
        if converted is None:
            return None
        values[name] = converted
    return values


def _is_plain(path: Path, delimiter: str) -> bool:
    """Whether pyarrow would take nothing in the file that the careful pass refuses."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20) + file.readline():
            if delimiter == "," and b'"' in block:
                return False
            # A single byte is found a hundred times faster than a pattern.
            if (b"x" in block or b"X" in block) and _HEXADECIMAL.search(block):
                return False
    return True


def _head(file: TextFile) -> pyarrow.BufferReader:
    """The file without its blank last lines."""
    with open(file.path, "rb") as content:
        return pyarrow.BufferReader(content.read(file.end))


def _arrow_type(column: Column) -> pyarrow.DataType:
    assert column.dtype is not None
    if column.dtype is np.str_:
        return pyarrow.string()
    return pyarrow.int64() if issubclass(column.dtype, np.integer) else pyarrow.float64()


def _converted(arrow: pyarrow.ChunkedArray, column: Column) -> np.ndarray | None:
    """None where a value is not as its column says."""
    compute = pyarrow.compute
    if column.dtype is np.str_:
        coded = arrow.dictionary_encode().combine_chunks()
        words = compute.utf8_trim(coded.dictionary, BLANKS)
        if len(words):
            size = compute.min_max(compute.utf8_length(words)).as_py()
            if size["min"] < 1 or size["max"] > MAX_ID_LENGTH:
                return None
            if compute.any(compute.match_substring_regex(words, CONTROL)).as_py():
                return None
        return np.array(words.to_pylist(), STRINGS)[coded.indices.to_numpy()]
    values = arrow.to_numpy()
    if len(values) and not (values.min() >= column.low and values.max() <= column.high):
        return None
    return values.astype(column.dtype, copy=False)


def _records(file: TextFile, delimiter: str) -> Iterator[tuple[Line, list[str]]]:
    if delimiter == ",":
        yield from records(file)
    else:
        for line in lines(file):
            yield line, [field.strip(BLANKS) for field in line.text.split(delimiter)]


def _read_carefully(
    file: TextFile, columns: Sequence[Column], delimiter: str, header: bool
) -> dict[str, np.ndarray]:
    """The definition of what `read_table` accepts, one line at a time."""
    read = [column for column in columns if column.dtype is not None]
    parts: dict[str, list[np.ndarray]] = {column.name: [] for column in read}
    form = delimiter.join(column.name for column in columns)
    for some in itertools.batched(itertools.islice(_records(file, delimiter), header, None), _ROWS):
        values: dict[str, list[int | float | str]] = {column.name: [] for column in read}
        for line, fields in some:
            if len(fields) != len(columns):
                raise line.error(f"expected {len(columns)} fields, {form}, found {len(fields)}")
            try:
                for field, column in zip(fields, columns, strict=True):
                    if column.dtype is not None:
                        values[column.name].append(_value(line, field, column))
            except ValueError as error:
                if line.number > 1:
                    raise
                raise ValueError(f"{error}. The columns must be {form}") from None
        for column in read:
            parts[column.name].append(np.array(values[column.name], _dtype(column)))
    return {
        column.name: np.concatenate(parts[column.name] or [np.zeros(0, _dtype(column))])
        for column in read
    }


def _dtype(column: Column) -> np.dtype:
    return STRINGS if column.dtype is np.str_ else np.dtype(column.dtype)


def _value(line: Line, text: str, column: Column) -> int | float | str:
    """A field as its column says. Raises ValueError where it is not like that."""
    assert column.dtype is not None
    if column.dtype is np.str_:
        return line.identifier(text, column.name)
    if issubclass(column.dtype, np.integer):
        return line.integer(text, column.name, column.low, column.high)
    return line.number_in(text, column.name, column.low, column.high)
