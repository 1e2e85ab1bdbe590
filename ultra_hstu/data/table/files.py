"""Files of own events: CSV, JSON lines and Parquet, plain or compressed, in batches by pyarrow.

Columns are known by name. What pyarrow stumbles over is looked for again, one line at a time, so
that errors name file, line (row group) and value.
"""

import dataclasses
import glob
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ultra_hstu.data.table.source import Types, json_object
from ultra_hstu.data.table.text_files import QUOTES, csv_records, open_raw, open_text
from ultra_hstu.data.table.values import (
    DATE,
    INTEGER,
    MISSING,
    fits,
    type_of_json,
    type_of_texts,
    words,
)
from ultra_hstu.data.text import Line

Format = Literal["csv", "json", "parquet"]
_FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# Text whose name does not say how it is written: CSV where it is named itself, not in a folder.
_TEXTS: dict[str, Format] = dict.fromkeys((".txt", ".dat", ".inter"), "csv")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = (
    f"{', '.join(_FORMATS)}, or {', '.join(_TEXTS)} for a file of CSV, also with "
    f"{' or '.join(_COMPRESSIONS)} where they are text"
)
_BLOCK_BYTES = 1 << 24
_TYPED = re.compile("(.+):(?:token|float)(?:_seq)?")  # a name of RecBole's atomic files
_BATCH_ROWS = 1 << 20
_SAMPLE_ROWS, _SAMPLE_CELLS = 1000, 100_000


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """How CSV is written, as far as it does not say so itself; see `data.table`."""

    delimiter: str | None = None
    names: tuple[str, ...] = ()
    quotes: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class TableFile:
    """A file of events, opened once to see its columns.

    Attributes:
        types: of every column, by name, as its first rows look.
        names: of the fields of a line of CSV, in order.
        header: whether the first line has them.
        quotes: whether fields of CSV may stand in quotes.
    """

    path: Path
    format: Format
    compression: str | None
    types: Types
    delimiter: str = ","
    names: tuple[str, ...] = ()
    header: bool = True
    quotes: bool = True

    def __str__(self) -> str:
        return str(self.path)

    @property
    def documented(self) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Types) -> Iterator[pa.RecordBatch]:
        """The rows with these columns, read as these types; text is dictionary-encoded. Parquet has
        types of its own.

        Raises ValueError with file, line and value of the first malformed row.
        """
        rows = {"csv": _csv_batches, "json": _json_batches, "parquet": _parquet_batches}
        try:
            yield from rows[self.format](self, wanted)
        except pa.ArrowInvalid as error:
            self._explain(wanted)
            raise ValueError(f"{self.path}: {error}") from None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read to its end ({error}): {_AGAIN}") from None

    def place(self, row: int) -> str:
        """Where a row is, counted from 0 as `batches` gives them."""
        if self.format == "parquet":
            with pa.parquet.ParquetFile(self.path) as file:
                for group in range(file.num_row_groups):
                    if row < (count := file.metadata.row_group(group).num_rows):
                        return f"{self.path}, row group {group}, row {row}"
                    row -= count
            raise IndexError(f"{self.path}: row {row}")
        line = next(itertools.islice(self._lines(), row, None))[0]
        return f"{self.path}, line {line.number}"

    def _lines(self) -> Iterator[tuple[Line, Sequence[str] | None]]:
        """The rows of a text file; of CSV with their fields."""
        with open_text(self.path, self.compression) as file:
            if self.format == "json":
                for number, text in enumerate(file, 1):
                    if text.strip():
                        yield Line(self.path, number, text.rstrip("\r\n")), None
                return
            rows = csv_records(self.path, file, self.delimiter, self.quotes)
            yield from itertools.islice(rows, int(self.header), None)

    def _explain(self, types: Types) -> None:
        """Raises ValueError for the first line that is not as `types` say."""
        if self.format == "parquet":
            return
        for line, fields in self._lines():
            if fields is None:
                values = json_object(line)
            elif len(fields) != len(self.names):
                problem = f"expected {len(self.names)} fields, found {len(fields)}"
                quoted = '"' in line.text and self.quotes
                raise line.error(problem, remedy=f": {QUOTES if quoted else CORRECT}")
            else:
                values = dict(zip(self.names, fields, strict=True))
            for name, kind in types.items():
                value = values.get(name)
                if value is None or (isinstance(value, str) and value in MISSING):
                    continue
                if not fits(value, kind):
                    problem = f"column {name!r} holds {words(kind)} in the lines before, here"
                    shown = value if isinstance(value, str | int) else str(value)
                    raise line.error(problem, shown, remedy=f": {LEAVE_EMPTY}")


CORRECT = "correct the line, or delete it"
LEAVE_EMPTY = (
    "correct it, or leave the field empty and such rows out by --config.data.table.missing=drop"
)
_AGAIN = "it may be cut off or damaged, copy it again"


def find_files(
    raw: str, other: Sequence[str | None] = (), layout: FileLayout = FileLayout()
) -> list[TableFile]:
    """The files that a path, a folder or a pattern means, sorted by name.

    Args:
        other: files that are not meant, although they may lie in the folder.

    Raises:
        ValueError: none, one of an unknown format, or one without columns; says what there is.
    """
    if re.match(r"[a-z][a-z0-9+]+://", raw):
        raise ValueError(f"data.raw_dir={raw!r}: URLs are not read, copy the files to this machine")
    path = Path(raw).expanduser()
    if path.is_dir():
        seen = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        left_out = {Path(name).expanduser().resolve() for name in other if name}
        paths = [p for p in seen if _format(p)[0] and p.resolve() not in left_out]
        if not paths:
            names = ", ".join(p.name for p in seen[:10]) or "nothing"
            raise ValueError(f"the folder {path} holds {names}, but no file of {_KNOWN}")
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not paths:
            raise ValueError(f"data.raw_dir={raw!r}: there is no such file, folder or pattern")
    return [open_file(one, layout) for one in paths]


def open_file(path: str | Path, layout: FileLayout = FileLayout()) -> TableFile:
    """A file, with its columns. Raises ValueError for one that has none, or an unknown format."""
    path = Path(path).expanduser()
    kind, compression = _format(path, _FORMATS | _TEXTS)
    if kind is None:
        raise ValueError(f"{path}: the name says no known format: use {_KNOWN}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if kind == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                twice = {name for name in schema.names if schema.names.count(name) > 1}
                types = {field.name: field.type for field in schema if field.name not in twice}
                return TableFile(path, kind, None, types)
        head = open_raw(path, compression).read(4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{path} is UTF-16: save it as UTF-8")
        if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK", b"PAR1")):
            raise ValueError(f"{path} is no text: is its name right? Known are {_KNOWN}")
        with open_text(path, compression) as file:
            if kind == "json":
                return TableFile(path, kind, compression, _json_types(path, file))
            return _csv_file(path, compression, file, layout)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}): {_AGAIN}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): {_AGAIN}") from None


# --- opening ---


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _format(path: Path, known: dict[str, Format] = _FORMATS) -> tuple[Format | None, str | None]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    kind = known.get(inner.suffix.lower())
    return (None if kind == "parquet" and compression else kind), compression


# --- CSV ---


def _csv_file(
    path: Path, compression: str | None, file: io.TextIOWrapper, layout: FileLayout
) -> TableFile:
    delimiter = layout.delimiter
    first = next((line for line in file if line.strip()), None)
    if first is None:
        raise ValueError(f"{path} is empty: expected a header with the names of the columns")
    if delimiter is None:
        tab = path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv")
        delimiter = "\t" if tab else max(",\t;|", key=first.count)
        if "::" in first:
            problem = "fields seem to be separated by '::', and one character must separate them"
            raise Line(path, 1, first.rstrip()).error(problem, remedy=": sed 's/::/\\t/g'")
    rows = csv_records(path, itertools.chain([first], file), delimiter, layout.quotes)
    header, fields = next(rows)
    if len(fields) == 1:
        raise header.error(
            "one field alone: expected columns, separated by a comma, a tab, ; or | (another one: "
            "--config.data.table.delimiter=...), in rows of an event each"
        )
    if layout.names:
        if len(layout.names) != len(fields):
            problem = f"data.table.names has {len(layout.names)} names for {len(fields)} fields"
            raise header.error(problem)
        names = list(layout.names)
        rows = itertools.chain([(header, fields)], rows)
    else:
        names = [_TYPED.sub(r"\1", name.strip()) for name in fields]
    numbers = [name for name in names if INTEGER.fullmatch(name) or DATE.fullmatch(name)]
    if numbers:
        raise header.error(
            f"the header holds {numbers[0]!r}, which is no name: the first line must name the "
            "columns, such as user_id,item_id,timestamp. If there is no header, name them by "
            '--config.data.table.names=\'("user","item","time",...)\'. The line'
        )
    sample: list[Sequence[str]] = []
    for _, fields in rows:
        sample.append(fields)
        if len(sample) >= _SAMPLE_ROWS or len(sample) * len(names) >= _SAMPLE_CELLS:
            break
    types: dict[str, pa.DataType] = {}
    twice = {name for name in names if name} if len(set(names)) < len(names) else set()
    twice = {name for name in twice if names.count(name) > 1}
    for index, name in enumerate(names):
        if name not in twice:
            values = [fields[index] for fields in sample if len(fields) > index]
            types[name] = type_of_texts([value for value in values if value not in MISSING])
    has_header = not layout.names
    return TableFile(
        path, "csv", compression, types, delimiter, tuple(names), has_header, layout.quotes
    )


def _csv_batches(file: TableFile, types: Types) -> Iterator[pa.RecordBatch]:
    header = sum(map(len, file.names)) + len(file.names)
    reader = pa.csv.open_csv(
        open_raw(file.path, file.compression),
        read_options=pa.csv.ReadOptions(
            block_size=max(_BLOCK_BYTES, 8 * header),
            column_names=[name or f" {place}" for place, name in enumerate(file.names)],
            skip_rows_after_names=0,
            skip_rows=_rows_above(file) if file.header else 0,
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=file.delimiter,
            newlines_in_values=file.quotes,
            quote_char='"' if file.quotes else False,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: _read_as(kind) for name, kind in types.items()},
            include_columns=list(types),
            null_values=list(MISSING),
            strings_can_be_null=True,
            true_values=["true", "True", "TRUE", "1"],
            false_values=["false", "False", "FALSE", "0"],
        ),
    )
    yield from reader


def _rows_above(file: TableFile) -> int:
    """Lines down to the header, which `column_names` replace."""
    with open_text(file.path, file.compression) as text:
        line, _ = next(csv_records(file.path, text, file.delimiter, file.quotes))
        return line.number


def _read_as(kind: pa.DataType) -> pa.DataType:
    """Integers may be ids with letters further down, so they are text until all are seen."""
    if pa.types.is_string(kind) or pa.types.is_null(kind):
        return pa.dictionary(pa.int32(), pa.string())
    return kind


# --- JSON lines ---


def _json_types(path: Path, file: io.TextIOWrapper) -> Types:
    values: dict[str, list[object]] = {}
    for number, text in enumerate(itertools.islice(file, _SAMPLE_ROWS), 1):
        if text.strip():
            for name, value in json_object(Line(path, number, text.rstrip("\r\n"))).items():
                values.setdefault(name, []).append(value)
    if not values:
        raise ValueError(f"{path} is empty: expected one JSON object a line")
    return {name: type_of_json(of_name) for name, of_name in values.items()}


def _json_batches(file: TableFile, types: Types) -> Iterator[pa.RecordBatch]:
    fields = [(n, pa.string() if pa.types.is_null(kind) else kind) for n, kind in types.items()]
    reader = pa.json.open_json(
        open_raw(file.path, file.compression),
        read_options=pa.json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa.json.ParseOptions(
            explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"
        ),
    )
    for batch in reader:
        yield pa.RecordBatch.from_arrays([_encoded(batch[name]) for name in types], list(types))


# --- Parquet ---


def _parquet_batches(file: TableFile, types: Types) -> Iterator[pa.RecordBatch]:
    text = [name for name, kind in types.items() if _is_text(kind)]
    with pa.parquet.ParquetFile(file.path, read_dictionary=text) as source:
        for batch in source.iter_batches(_BATCH_ROWS, columns=list(types)):
            yield pa.RecordBatch.from_arrays([_encoded(batch[name]) for name in types], list(types))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _encoded(values: pa.Array) -> pa.Array:
    if pa.types.is_string_view(values.type) or pa.types.is_large_string(values.type):
        values = values.cast(pa.string())
    return values.dictionary_encode() if _is_text(values.type) else values
