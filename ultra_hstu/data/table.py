"""The source `table`: anybody's own events, from files or frames, as `Interactions`.

Files are read once, in batches, and prepared under `data_dir`: arrays in one npz file, the
catalogue, the features of users, and how the columns were read.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.interchange
from jaxtyping import Bool, Int64, Num

from ultra_hstu.config import DataConfig
from ultra_hstu.data import grouping, npz, sums
from ultra_hstu.data import table_columns as meaning
from ultra_hstu.data.builder import CATALOG, CONTEXTS, locked
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.grouping import Coded, EventColumns, Titles
from ultra_hstu.data.interactions import Interactions, ordered
from ultra_hstu.data.table_columns import Columns, Comparison
from ultra_hstu.data.table_files import TableFile, Types, find_files, is_date
from ultra_hstu.data.table_ids import BadId, TextColumn, ids, texts
from ultra_hstu.data.table_sides import read_titles, read_users
from ultra_hstu.data.times import EARLY, FIRST_SECOND, LAST_SECOND, TICKS
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
_VERSION = 1  # of what is prepared
_EVENTS, _READING = "interactions.npz", "reading.json"
_SILENCE = 5.0  # seconds between two lines of progress
_REMEDY = "its folder can be deleted"


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A table in memory."""

    table: pa.Table

    @property
    def types(self) -> Types:
        return {field.name: field.type for field in self.table.schema}

    def batches(self, wanted: Types) -> Iterable[pa.RecordBatch]:
        return self.table.select(list(wanted)).to_batches(max_chunksize=1 << 20)

    def place(self, row: int) -> str:
        return f"row {row} of the frame"

    def __str__(self) -> str:
        return "the frame"


Source = TableFile | Frame


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a table was read, to be shown: the columns, the unit of the times and their range, and
    how many events there were and were dropped, by reason."""

    columns: dict[str, str | None]
    actions: tuple[str, ...]
    unread: tuple[str, ...]
    unit: str
    times: tuple[int, int] | None
    events: int
    dropped: dict[str, int]

    def lines(self) -> list[str]:
        """What a user must see before anything is made from the data."""
        named = [f"{part} = {name}" for part, name in self.columns.items() if name]
        lines = [f"columns: {', '.join(named)}; actions: {', '.join(self.actions) or 'none'}"]
        if self.unread:
            lines.append(
                f"not read: {meaning.listed(self.unread)} "
                "(--config.data.table.actions=NAME reads more)"
            )
        if self.times is None:
            lines.append("times: none, rows are in order")
        else:
            first, last = map(meaning.day, self.times)
            lines.append(f"times: {meaning.unit_words(self.unit)}, {first} to {last}")
        return lines


# --- prepared data ---


def load(config: DataConfig) -> Interactions:
    """The events of `config.raw_dir`, prepared under `config.data_dir` where they are not yet.

    Raises:
        ValueError: bad input; names file, line (row group), column, value and remedy.
    """
    folder = prepare(config)
    reading = read_reading(folder)
    for line in reading.lines():
        _log.info(line)
    for reason, count in reading.dropped.items():
        _log.info("dropped: %d of %d events %s", count, reading.events, reason)
    contexts = Contexts.load(folder / CONTEXTS)
    with npz.reading(folder / _EVENTS, "readable", _REMEDY) as file:
        arrays = {name: file[name] for name in file}
    interactions = Interactions(
        users=arrays["users"],
        items=arrays["items"],
        offsets=arrays["offsets"],
        timestamps=arrays.get("timestamps"),
        actions={
            name.removeprefix("actions/"): values
            for name, values in arrays.items()
            if name.startswith("actions/")
        },
        catalog=Catalog.load(folder / CATALOG),
        contexts=contexts.of(arrays["users"]),
        context_values=contexts.values,
        features=config.table.features,
    )
    if config.ties == "stable":  # as they are
        return interactions
    return ordered(interactions, ties=config.ties, seed=config.ties_seed)


def read_reading(folder: Path) -> Reading:
    """How the data in a prepared folder was read. Raises ValueError where that is damaged."""
    try:
        values = json.loads((folder / _READING).read_text())
        tuples = ("actions", "unread", "times")
        return Reading(
            **{k: tuple(v) if k in tuples and v is not None else v for k, v in values.items()}
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _READING} is not readable ({error}): {_REMEDY}") from None


def prepare(config: DataConfig) -> Path:
    """The folder of the prepared events, made where it is not there: whole, or not at all.

    It is named after the content of the files and the settings that they are read with. What was
    damaged since is prepared again, with a warning.
    """
    table, data_dir = config.table, Path(config.data_dir).expanduser()
    if config.raw_dir is None:
        raise ValueError(
            "data.raw_dir is not set: name your events, such as "
            "--config.data.raw_dir=events.parquet (a file, a folder or a pattern)"
        )
    sides = (table.items_file, table.users_file)
    files = find_files(config.raw_dir, sides, table.delimiter)
    named = [*(file.path for file in files), *(Path(s).expanduser() for s in sides if s)]
    made_from = (_VERSION, dataclasses.asdict(table), [_sum(path) for path in named])
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()
    folder = data_dir / f"table-{key[:16]}"
    if (damage := sums.damage(folder)) is None:
        return folder
    columns = meaning.choose(list(files[0].types), table, files[0].path)
    with locked(data_dir / "table.lock", damage):
        if sums.damage(folder) is None:  # made by another run meanwhile
            return folder
        if folder.exists():
            _log.warning("%s: the data is prepared again", damage)
        count = f" and {len(files) - 1} more" if len(files) > 1 else ""
        read = ", ".join(f"{name} ({files[0].types[name]})" for name in columns.names)
        _log.info("preparing %s%s: %s", files[0].path, count, read)
        part = folder.with_name(folder.name + ".incomplete")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            _write(part, files, columns, table)
            sums.write(part, sums.checksums(part, [path.name for path in part.iterdir()]))
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _sum(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return sums.digest(path)


def _write(folder: Path, files: Sequence[TableFile], columns: Columns, config: TableConfig) -> None:
    """Reads the files and writes all that is prepared."""
    started = time.perf_counter()
    interactions, reading = from_sources(files, columns, config)
    if config.users_file is not None:
        contexts = read_users(config, columns.user, interactions.users)
    else:
        contexts = Contexts()
    arrays = {
        "users": interactions.users,
        "items": interactions.items,
        "offsets": interactions.offsets,
        **{f"actions/{name}": values for name, values in interactions.actions.items()},
    }
    if interactions.timestamps is not None:
        arrays["timestamps"] = interactions.timestamps
    npz.save(folder / _EVENTS, arrays, compress=False)
    interactions.catalog.save(folder / CATALOG)
    contexts.save(folder / CONTEXTS)
    (folder / _READING).write_text(json.dumps(dataclasses.asdict(reading), indent=1))
    _log.info("prepared in %.1f s", time.perf_counter() - started)


# --- frames ---


def from_frame(frame: object, config: TableConfig, titles: Titles | None) -> Interactions:
    """Events of a frame in memory; see `Interactions.from_table`."""
    table = _arrow(frame)
    names = [name for name in table.column_names if table.column_names.count(name) == 1]
    columns = meaning.choose(names, config, "the frame")
    interactions, reading = from_sources([Frame(table)], columns, config, titles)
    for line in reading.lines():
        _log.info(line)
    return interactions


def _arrow(frame: object) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    if hasattr(frame, "__arrow_c_stream__"):
        return pa.table(frame)
    if hasattr(frame, "__dataframe__"):
        return pa.interchange.from_dataframe(frame)
    raise ValueError(
        f"{type(frame).__name__} is no frame that can be read: give one of pandas, polars or "
        "pyarrow, or use Interactions.from_arrays"
    )


# --- reading ---


def from_sources(
    sources: Sequence[Source],
    columns: Columns,
    config: TableConfig,
    titles: Titles | None = None,
) -> tuple[Interactions, Reading]:
    """Reads all sources, in their order, and groups their events by user."""
    reader = _Reader(columns, config)
    for source in sources:
        reader.add(source)
    return reader.group(sources[0], titles)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Events of a batch: those of a source's rows from `row` on, or only of some of them."""

    source: Source
    row: int
    count: int
    chosen: Int64[np.ndarray, " n"] | None


class _Reader:
    """Gathers columns batch by batch."""

    def __init__(self, columns: Columns, config: TableConfig):
        self.columns, self.config = columns, config
        self.ids = {"user": TextColumn(), "item": TextColumn()}
        self.times: list[Num[np.ndarray, " n"]] = []
        self.unit: str | None = None  # None: to be found by range
        self.numbers: dict[str, list[Num[np.ndarray, " n"]]] = {}
        self.texts: dict[str, TextColumn] = {}
        self.titles = TextColumn()
        self.pieces: list[_Piece] = []
        self.events = self.kept = self.missing = 0

    def add(self, source: Source) -> None:
        """All rows of a source."""
        for name in self.columns.names:
            if name not in source.types:
                raise ValueError(
                    f"{_name(source)} has no column {name!r}, which the first file has; its "
                    f"columns are {meaning.listed(list(source.types))}"
                )
        wanted = {name: self._read_as(name, source) for name in self.columns.names}
        row, shown = 0, time.monotonic()
        for batch in source.batches(wanted):
            self._add(source, row, batch)
            row += batch.num_rows
            if time.monotonic() - shown > _SILENCE:
                shown = time.monotonic()
                _log.info("reading %s: %d events", _name(source), row)

    def _read_as(self, name: str, source: Source) -> pa.DataType:
        """Ids of CSV are text until all are seen, and numbers may have fractions further down."""
        kind, columns = source.types[name], self.columns
        csv = isinstance(source, TableFile) and source.format == "csv"
        if name in (columns.user, columns.item):
            return pa.string() if csv else kind
        if name == columns.time or not pa.types.is_integer(kind):
            return kind
        return pa.float64() if isinstance(source, TableFile) else kind

    def _add(self, source: Source, row: int, batch: pa.RecordBatch) -> None:
        columns, count = self.columns, batch.num_rows
        of = dict(zip(self.columns.names, batch.columns, strict=True))
        needed = [name for name in (columns.user, columns.item, columns.time) if name]
        gaps = {name: _gaps(of[name]) for name in needed}
        missing = np.logical_or.reduce(list(gaps.values()))
        chosen = None
        if missing.any():
            if self.config.missing == "refuse":
                first = int(np.argmax(missing))
                name = next(name for name in needed if gaps[name][first])
                raise ValueError(
                    f"{source.place(row + first)}: column {name!r} is missing a value: fill it "
                    "in, or leave such rows out by --config.data.table.missing=drop"
                )
            chosen = np.flatnonzero(~missing)
            self.missing += int(missing.sum())
            of = {name: values.take(pa.array(chosen)) for name, values in of.items()}
        kept = count if chosen is None else len(chosen)
        self.pieces.append(_Piece(source, row, kept, chosen))
        self.events += count
        self.kept += kept
        for part, name in (("user", columns.user), ("item", columns.item)):
            self._add_text(self.ids[part], name, of[name], source)
        if columns.time is not None:
            self._add_times(columns.time, of[columns.time], source)
        if columns.title is not None:
            self._add_text(self.titles, columns.title, of[columns.title], source)
        for name in columns.actions:
            self._add_action(name, of[name], source)

    def _add_text(self, column: TextColumn, name: str, values: pa.Array, source: Source) -> None:
        if not len(values):
            return
        try:
            column.add(values)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"{_name(source)}: column {name!r} cannot be read as ids or text ({error}): "
                "write it in one kind in all files"
            ) from None

    def _add_times(self, name: str, values: pa.Array, source: Source) -> None:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        kind, stated = values.type, self.config.time_unit
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            values, kind = self._dates(name, values)
        unit = None if stated == "auto" else stated
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            if stated != "auto":
                raise ValueError(
                    f"data.table.time_unit={stated!r}: column {name!r} of {_name(source)} holds "
                    "times with a unit of their own: leave it out"
                )
            unit = "us"
            try:
                values = values.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{_name(source)}: column {name!r}: {error}") from None
            array = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            array = values.to_numpy(zero_copy_only=False)
        else:
            raise ValueError(
                f"{_name(source)}: column {name!r} holds {kind}, no times: name another one by "
                "--config.data.table.time=NAME"
            )
        if self.times and unit != self.unit:
            raise ValueError(
                f"{_name(source)}: column {name!r} holds {kind}, unlike the files before: write "
                "times in one way in all of them"
            )
        self.unit = unit
        self.times.append(_compact(array))

    def _dates(self, name: str, values: pa.Array) -> tuple[pa.Array, pa.DataType]:
        """Text as numbers, or as dates, without or with a time zone."""
        for kind in (pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            try:
                return values.cast(kind), kind
            except pa.ArrowInvalid:
                continue
        of_values = values.to_pylist()
        bad = next((n for n, text in enumerate(of_values) if not is_date(text)), 0)
        raise ValueError(
            f"{self.place(self.kept - len(values) + bad)}: column {name!r} holds "
            f"{of_values[bad][:80]!r}, among text that is not all dates such as 2020-01-31 "
            "23:59:59 (or all with a time zone): write it so, or as seconds since 1970"
        )

    def _add_action(self, name: str, values: pa.Array, source: Source) -> None:
        kind = values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            if values.null_count:
                number = values.cast(pa.int8()) if pa.types.is_boolean(kind) else values
                values = number.cast(pa.float64(), safe=False)
            other = name in self.texts
            numbers = _narrow(values.to_numpy(zero_copy_only=False))
            self.numbers.setdefault(name, []).append(numbers)
        elif pa.types.is_nested(kind) or pa.types.is_temporal(kind) or pa.types.is_binary(kind):
            raise ValueError(
                f"{_name(source)}: column {name!r} holds {kind}, which can be no action: use "
                "numbers, true and false, or text"
            )
        else:
            other = name in self.numbers
            self._add_text(self.texts.setdefault(name, TextColumn()), name, values, source)
        if other:
            raise ValueError(
                f"{_name(source)}: column {name!r} holds {kind}, unlike the files before"
            )

    def place(self, event: int) -> str:
        """Where an event was read."""
        for piece in self.pieces:
            if event < piece.count:
                row = event if piece.chosen is None else int(piece.chosen[event])
                return piece.source.place(piece.row + row)
            event -= piece.count
        raise IndexError(f"event {event}")

    def group(self, first: Source, titles: Titles | None) -> tuple[Interactions, Reading]:
        """All that was read."""
        columns, config = self.columns, self.config
        if not any(piece.count for piece in self.pieces):
            raise ValueError(f"{_name(first)} has no events: expected rows below the header")
        user, item = self._coded("user"), self._coded("item")
        actions, texts_of = self._actions()
        for task, rule in config.tasks.items():
            comparison = Comparison.of(rule)
            actions[task] = comparison.labels(
                actions[comparison.column], texts_of.get(comparison.column)
            )
        ticks_E, unit, span = self._ticks()
        dropped = {"that miss a value": self.missing} if self.missing else {}
        if columns.title is not None:
            titles = self._titles(item)
        events = EventColumns(user, item, ticks_E, actions)
        del user, item, ticks_E, actions
        if config.items_file is not None:
            titles = read_titles(config, columns.item, events.item.ids)
            dropped |= self._without_unlisted(events, titles)
        interactions, more = grouping.group(events, config, titles)
        if (seconds := interactions.timestamps) is not None:
            for block in grouping.blocks(len(seconds)):
                seconds[block] //= TICKS[unit]
        rules = (f"{task} ({rule})" for task, rule in config.tasks.items())
        reading = Reading(
            columns={
                "user": columns.user,
                "item": columns.item,
                "time": columns.time,
                "title": columns.title,
            },
            actions=(*columns.actions, *rules),
            unread=tuple(name for name in first.types if name not in columns.names)[:100],
            unit=self.unit or "none",
            times=span,
            events=self.events,
            dropped=dropped | more,
        )
        return dataclasses.replace(interactions, features=config.features), reading

    def _coded(self, part: str) -> Coded:
        try:
            return self.ids[part].take(ids)
        except BadId as bad:
            name = getattr(self.columns, part)
            raise ValueError(
                f"{self.place(bad.event)}: column {name!r}: {bad.problem}: {str(bad.value)[:80]!r}"
            ) from None

    def _actions(self) -> tuple[dict[str, Num[np.ndarray, " E"]], dict[str, list[str]]]:
        """The columns by name, and of those of text what their codes 1, 2, ... stand for."""
        actions, texts_of = {}, {}
        for name in self.columns.actions:
            if name in self.numbers:
                parts = self.numbers.pop(name)
                whole = all(part.dtype == np.int32 for part in parts)
                actions[name] = _joined(parts, np.int32 if whole else np.float32)
            else:
                coded = self.texts.pop(name).take(texts)
                texts_of[name] = coded.ids.tolist()
                actions[name] = coded.code_E + np.int32(1)
        return actions, texts_of

    def _ticks(self) -> tuple[Int64[np.ndarray, " E"] | None, str, tuple[int, int] | None]:
        """The times, finer than seconds where they are; their unit, and the first and last second.

        Raises ValueError for a unit that cannot be told, and for the first time out of range.
        """
        name = self.columns.time
        if name is None:
            return None, "s", None
        whole = all(part.dtype.kind == "i" for part in self.times)
        values = _joined(self.times, np.int64 if whole else np.float64)
        low, high = values.min(), values.max()
        if self.unit is None:
            self.unit = unit = meaning.unit_by_range(low.item(), high.item(), name, self.config)
            if unit != "s" and low < EARLY * TICKS[unit]:
                raise ValueError(
                    f"{self.place(int(np.argmin(values)))}: column {name!r}: {low} among times in "
                    f"{meaning.unit_words(unit)} would be "
                    f"{meaning.day(int(meaning.seconds(np.array([low]), unit)[0]))}: are two units "
                    f"mixed? If not, say so by --config.data.table.time_unit={unit}"
                )
        unit = self.unit
        try:
            span = tuple(int(meaning.seconds(np.array([v]), unit)[0]) for v in (low, high))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r}: {error}") from None
        for second, event in zip(span, (np.argmin(values), np.argmax(values)), strict=True):
            if not FIRST_SECOND <= second <= LAST_SECOND:
                raise ValueError(
                    f"{self.place(int(event))}: column {name!r}: {values[event]} "
                    f"{meaning.unit_words(unit)} since 1970 lie outside 1901 to 2106: correct it, "
                    "or name the unit by --config.data.table.time_unit=..."
                )
        if unit not in TICKS:
            return meaning.seconds(values, unit), "s", span
        if whole:
            return values, unit, span
        if unit == "s":  # fractions order what is in one second
            return np.floor(values * TICKS["us"]).astype(np.int64), "us", span
        return np.floor(values).astype(np.int64), unit, span

    def _titles(self, item: Coded) -> dict[int | str, str]:
        """Of every item, what its first event has."""
        title = self.titles.take(texts)
        _, first = np.unique(item.code_E, return_index=True)
        known = [*title.ids.tolist(), ""]  # the last where there is none
        of_item = (known[code] for code in title.code_E[first].tolist())
        return dict(zip(item.ids.tolist(), of_item, strict=True))

    def _without_unlisted(self, events: EventColumns, titles: Titles) -> dict[str, int]:
        """Sees to items that the items table lacks; how many events are dropped."""
        known: Mapping[Any, str] = titles
        listed_I = np.array([raw in known for raw in events.item.ids.tolist()])
        if listed_I.all() or self.config.unlisted_items == "keep":
            return {}
        keep_E = listed_I[events.item.code_E]
        words = f"of items that {self.config.items_file} lacks"
        if self.config.unlisted_items == "refuse":
            event = int(np.argmin(keep_E))
            raise ValueError(
                f"{self.place(event)}: column {self.columns.item!r}: the item "
                f"{events.item.ids.tolist()[events.item.code_E[event]]!r} is not in "
                f"{self.config.items_file}, which lacks {int((~listed_I).sum())} of "
                f"{len(listed_I)} items: add them, or choose --config.data.table.unlisted_items="
                "keep (without a title) or drop"
            )
        _log.warning("dropped %d events %s", int((~keep_E).sum()), words)
        events.select(keep_E)
        return {words: int((~keep_E).sum())}


def _name(source: Source) -> str:
    return str(source.path) if isinstance(source, TableFile) else str(source)


def _gaps(values: pa.Array) -> Bool[np.ndarray, " n"]:
    """Where a value is missing, or no number."""
    number = pa.types.is_floating(values.type)
    if not number and not values.null_count:
        return np.zeros(len(values), bool)
    return values.is_null(nan_is_null=number).to_numpy(zero_copy_only=False)


def _compact(times: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """Integers in as few bytes as they need while a file is read."""
    if times.dtype.kind not in "iu":
        return times.astype(np.float64, copy=False)
    small = not times.size or (times.min() >= -(2**31) and times.max() < 2**31)
    return times.astype(np.int32 if small else np.int64)


def _narrow(numbers: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """int32 where nothing is lost by it, else float32."""
    if numbers.dtype.kind == "b":
        return numbers.astype(np.int32)
    with np.errstate(invalid="ignore"):
        whole = numbers.astype(np.int32)
    return whole if np.array_equal(whole, numbers) else numbers.astype(np.float32)


def _joined(parts: list[Num[np.ndarray, " n"]], dtype: type[np.generic]) -> Num[np.ndarray, " E"]:
    """One array of all parts, which are given up one by one."""
    joined, at = np.empty(sum(map(len, parts)), dtype), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[at : at + len(part)] = part
        at += len(part)
    return joined
