"""Files of a known format with one record a line: columns in batches, fast where they are clean;
errors name file, line and value.

pyarrow reads clean files at more than a million lines a second. Whatever it stumbles over, and any
value that is not as its column says, sends the rest of the file through a slow pass, which is the
definition of what is read, and which names the first bad line.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ultra_hstu.data.text import (
    BLANKS,
    CONTROL,
    MAX_ID,
    MAX_ID_LENGTH,
    Line,
    TextFile,
    examine,
    lines,
    open_binary,
    records,
)
from ultra_hstu.data.times import TimeCheck, Unit

_log = logging.getLogger(__name__)
_ROWS = 1 << 16  # that the careful pass holds as Python objects
_BLOCK_BYTES = 1 << 24
_LONGEST_HEADER = 1 << 16
Value = int | float | str | None


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of a line.

    Attributes:
        dtype: the NumPy type that it is read as; None: it is not read.
        low, high: the range that a number must lie in.
        unit: of a time; its range then follows from the unit.
        allowed: of text, every value that the publisher documents, in the order of their codes; ():
            any.
        empty: whether the field may be empty.
        whole: whether numbers are whole, although they may be held as floats.
    """

    name: str
    dtype: type[np.generic] | None
    low: int | float = 0
    high: int | float = MAX_ID
    unit: Unit | None = None
    allowed: tuple[str, ...] = ()
    empty: bool = False
    whole: bool = False

    @staticmethod
    def time(name: str, unit: Unit) -> "Column":
        """A column of times, checked by their range in this unit."""
        return Column(name, np.int64, -MAX_ID, MAX_ID, unit)

    @staticmethod
    def skipped(*names: str) -> "tuple[Column, ...]":
        """Columns that are not read."""
        return tuple(Column(name, None) for name in names)

    @property
    def type(self) -> pa.DataType:
        """What batches hold it as; text is dictionary-encoded there."""
        return pa.string() if self.dtype is np.str_ else pa.from_numpy_dtype(self.dtype)

    def value(self, line: Line, text: str) -> Value:
        """A field as it counts. Raises ValueError where it is not like that."""
        assert self.dtype is not None
        if self.empty and not text:
            return None
        if self.dtype is np.str_:
            found = line.identifier(text, self.name)
            if self.allowed and found not in self.allowed:
                problem = f"{self.name} must be one of {', '.join(self.allowed)}"
                raise line.error(problem, found)
            return found
        if self.whole or issubclass(self.dtype, np.integer):
            return line.integer(text, self.name, self.low, self.high)
        return line.number_in(text, self.name, self.low, self.high)


@dataclasses.dataclass(frozen=True, eq=False)
class DelimitedFile:
    """A file with one record a line.

    Attributes:
        columns: every field of a line, in order.
        delimiter: one character, or one character twice ("::"). Fields may stand in quotes where it
            is a comma.
        header: whether the first line holds the names of the columns, in any order.
        others: whether the header may have more columns, which are not read.
        look: sees the file before it is read, and raises ValueError where it is another one.
        after: sees the largest value of every integer column.
    """

    path: Path
    columns: tuple[Column, ...]
    delimiter: str = ","
    header: bool = False
    others: bool = False
    look: Callable[[Path], None] | None = None
    after: Callable[[Path, Mapping[str, int]], None] | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def types(self) -> dict[str, pa.DataType]:
        return {column.name: column.type for column in self.columns if column.dtype is not None}

    @property
    def documented(self) -> dict[str, tuple[str, ...]]:
        """The values that columns of text can have, where the publisher says which."""
        return {column.name: column.allowed for column in self.columns if column.allowed}

    def place(self, row: int) -> str:
        """File and line of a row."""
        return f"{self.path}, line {row + (2 if self.header else 1)}"

    def batches(self, wanted: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        """The rows, with these columns.

        Raises:
            ValueError: file, line and value of the first malformed line; times in another unit; an
                empty file, and one that is not text.
        """
        file = examine(self.path)
        if self.look is not None:
            self.look(self.path)
        in_file = self._in_file(file)
        read = [column for column in in_file if column.name in wanted]
        checks = {
            column.name: TimeCheck(column.unit, self._place_of(column.name))
            for column in read
            if column.unit is not None
        }
        row, largest = 0, dict[str, int]()
        for batch in self._rows(file, in_file, read):
            for name, check in checks.items():
                times = batch[name].drop_null().to_numpy(zero_copy_only=False)
                check.add(np.floor(times).astype(np.int64))
            if self.after is not None:
                for column in read:
                    if column.dtype is np.int64:
                        high = pc.max(batch[column.name]).as_py()
                        largest[column.name] = max(high, largest.get(column.name, high))
            row += batch.num_rows
            yield batch.select(list(wanted))
        if not row:
            form = self.delimiter.join(column.name for column in self.columns)
            raise ValueError(f"{self.path} is empty: expected lines of {form}")
        for check in checks.values():
            check.finish()
        if self.after is not None:
            self.after(self.path, largest)
        if not file.newline and in_file[-1].dtype is not None and self.path.suffix != ".gz":
            _warn_of_a_cut(self.path, self.delimiter)

    def _place_of(self, name: str) -> Callable[[int], str]:
        return lambda row: f"{self.place(row)}: {name}"

    def _in_file(self, file: TextFile) -> Sequence[Column]:
        """The columns in the order of the file."""
        if not self.header:
            return self.columns
        line, names = next(_records(file, self.delimiter))
        by_name = {column.name: column for column in self.columns}
        if self.others and (missing := [name for name in by_name if name not in names]):
            raise line.error(f"the header lacks {', '.join(missing)}")
        if sorted(names) != sorted(by_name) and not (self.others and len(set(names)) == len(names)):
            form = self.delimiter.join(by_name)
            raise line.error(f"expected the header {form}")
        return [by_name.get(name, Column(name, None)) for name in names]

    def _rows(
        self, file: TextFile, in_file: Sequence[Column], read: Sequence[Column]
    ) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `read`, in either way."""
        done = 0
        try:
            for batch in _fast_batches(file, in_file, read, self.delimiter, self.header):
                checked = [_checked(batch[column.name], column) for column in read]
                arrays = [array for array in checked if array is not None]
                if len(arrays) < len(read):
                    break
                yield pa.RecordBatch.from_arrays(arrays, [column.name for column in read])
                done += batch.num_rows
            else:
                return
        except pa.ArrowInvalid:
            pass
        yield from _careful_batches(file, in_file, read, self.delimiter, self.header + done)


# --- fast ---


def _fast_batches(
    file: TextFile,
    columns: Sequence[Column],
    read: Sequence[Column],
    delimiter: str,
    header: bool,
) -> Iterator[pa.RecordBatch]:
    """Raises pyarrow.ArrowInvalid where only the careful pass can judge."""
    if not _is_plain(file.path, delimiter, header):
        raise pa.ArrowInvalid("quotes or hexadecimal numbers")
    types = {column.name: _read_as(column) for column in read}
    names = [column.name for column in columns]
    if len(delimiter) == 2:  # "a::b" is a, nothing, b when split at ":"
        gaps = [f"gap before {name}" for name in names[1:]]
        types |= dict.fromkeys(gaps, pa.null())
        names[1:] = itertools.chain(*zip(gaps, names[1:], strict=True))
    yield from pa.csv.open_csv(
        _head(file) if file.blank_lines else pa.input_stream(str(file.path)),
        read_options=pa.csv.ReadOptions(
            column_names=names, skip_rows=int(header), block_size=_BLOCK_BYTES
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter[0], quote_char=False, ignore_empty_lines=False
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=types,
            include_columns=list(types),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _read_as(column: Column) -> pa.DataType:
    assert column.dtype is not None
    if column.dtype is np.str_:
        return pa.dictionary(pa.int32(), pa.string())
    whole = column.whole or issubclass(column.dtype, np.integer)
    return pa.int64() if whole else pa.float64()


def _is_plain(path: Path, delimiter: str, header: bool) -> bool:
    """Whether the file has nothing that pyarrow takes and the careful pass refuses: hexadecimal
    numbers, and text behind a closing quote."""
    with open_binary(path) as file:
        # The line of a header is not read again, so it may have quotes.
        first = file.readline(_LONGEST_HEADER) if header else b""
        if first.count(b'"') % 2 or b"\r" in first.rstrip() or len(first) == _LONGEST_HEADER:
            return False
        while block := file.read(1 << 20) + file.readline():
            if delimiter == "," and b'"' in block:
                return False
            if _has_hexadecimal(block):
                return False
    return True


def _has_hexadecimal(block: bytes) -> bool:
    """Whether a field may begin with 0x. Bytes are found ten times faster than a pattern."""
    for mark in (b"0x", b"0X"):
        at = block.find(mark)
        while at >= 0:
            before = block[max(at - 2, 0) : at].removesuffix(b"-")[-1:]
            if not before or before in b" \t\r\n,:|":
                return True
            at = block.find(mark, at + 2)
    return False


def _head(file: TextFile) -> pa.BufferReader:
    """The file without its blank last lines."""
    with open_binary(file.path) as content:
        return pa.BufferReader(content.read(file.end))


def _checked(values: pa.Array, column: Column) -> pa.Array | None:
    """The values in the type of their column; None where one is not as the column says."""
    if values.null_count and not column.empty:
        return None
    if column.dtype is np.str_:
        words = pc.utf8_trim(values.dictionary, BLANKS)
        if len(words):
            size = pc.min_max(pc.utf8_length(words)).as_py()
            if size["min"] < 1 or size["max"] > MAX_ID_LENGTH:
                return None
            if pc.any(pc.match_substring_regex(words, CONTROL)).as_py():
                return None
            if column.allowed and not pc.all(pc.is_in(words, pa.array(column.allowed))).as_py():
                return None
        return pa.DictionaryArray.from_arrays(values.indices, words)
    numbers = values.drop_null().to_numpy(zero_copy_only=False)
    if len(numbers) and not (numbers.min() >= column.low and numbers.max() <= column.high):
        return None
    return values.cast(column.type, safe=False)


# --- careful ---


def _records(file: TextFile, delimiter: str) -> Iterator[tuple[Line, list[str]]]:
    if delimiter == ",":
        yield from records(file)
    else:
        for line in lines(file):
            yield line, [field.strip(BLANKS) for field in line.text.split(delimiter)]


def _careful_batches(
    file: TextFile, columns: Sequence[Column], read: Sequence[Column], delimiter: str, skipped: int
) -> Iterator[pa.RecordBatch]:
    """The definition of what a file holds, one line at a time."""
    form = delimiter.join(column.name for column in columns)
    named = {column.name for column in read}
    rows = itertools.islice(_records(file, delimiter), skipped, None)
    for some in itertools.batched(rows, _ROWS):
        values: dict[str, list[Value]] = {column.name: [] for column in read}
        for line, fields in some:
            if len(fields) != len(columns):
                raise line.error(f"expected {len(columns)} fields, {form}, found {len(fields)}")
            try:
                for field, column in zip(fields, columns, strict=True):
                    if column.name in named:
                        values[column.name].append(column.value(line, field))
            except ValueError as error:
                if line.number > 1:
                    raise
                raise ValueError(f"{error}. The columns must be {form}") from None
        arrays = [_array(values[column.name], column) for column in read]
        yield pa.RecordBatch.from_arrays(arrays, [column.name for column in read])


def _array(values: Sequence[Value], column: Column) -> pa.Array:
    array = pa.array(values, column.type)
    return array.dictionary_encode() if column.dtype is np.str_ else array


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
