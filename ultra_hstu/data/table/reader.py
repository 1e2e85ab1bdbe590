"""Reads own events, batch by batch, and groups them."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Num

from ultra_hstu.data import grouping
from ultra_hstu.data.delimited import DelimitedFile
from ultra_hstu.data.grouping import Coded, EventColumns, Titles
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.table import columns as meaning
from ultra_hstu.data.table.chunks import (
    BadId,
    TextColumn,
    compact,
    exact_ids,
    gaps,
    ids,
    joined,
    narrow,
    texts,
)
from ultra_hstu.data.table.columns import TICKS, Columns, Comparison, Reading
from ultra_hstu.data.table.files import TableFile
from ultra_hstu.data.table.sides import ItemTable, read_items
from ultra_hstu.data.table.source import Frame, TableSource
from ultra_hstu.data.table.values import is_date
from ultra_hstu.data.times import EARLY, FIRST_SECOND, LAST_SECOND
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
_SILENCE = 5.0  # seconds between two lines of progress
_MAX_SPAN = 2**31 - 1  # of all times, in seconds: batches hold them as int32


def from_sources(
    sources: Sequence[TableSource],
    columns: Columns,
    config: TableConfig,
    titles: Titles | None = None,
    items: TableSource | None = None,
) -> tuple[Interactions, Reading]:
    """Reads all sources, in their order, and groups their events by user.

    Args:
        titles: of items, by id; None: those of the events, or of `items`.
        items: the table of items.
    """
    reader = _Reader(columns, config)
    for source in sources:
        reader.add(source)
    return reader.group(sources[0], titles, items)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Events of a batch: those of a source's rows from `row` on, or only of some of them."""

    source: TableSource
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

    def add(self, source: TableSource) -> None:
        """All rows of a source."""
        for name in self.columns.names:
            if name not in source.types:
                raise ValueError(
                    f"{source} has no column {name!r}, which the first file has; its "
                    f"columns are {meaning.listed(list(source.types))}"
                )
        wanted = {name: self._read_as(name, source) for name in self.columns.names}
        row, shown = 0, time.monotonic()
        for batch in source.batches(wanted):
            self._add(source, row, batch)
            row += batch.num_rows
            if time.monotonic() - shown > _SILENCE:
                shown = time.monotonic()
                _log.info("reading %s: %d events", source, row)

    def _read_as(self, name: str, source: TableSource) -> pa.DataType:
        """Ids of CSV are text until all are seen, and numbers may have fractions further down."""
        kind, columns = source.types[name], self.columns
        csv = isinstance(source, TableFile) and source.format == "csv"
        if name in (columns.user, columns.item):
            return pa.string() if csv else kind
        if name == columns.time or not pa.types.is_integer(kind):
            return kind
        return pa.float64() if isinstance(source, TableFile) else kind

    def _add(self, source: TableSource, row: int, batch: pa.RecordBatch) -> None:
        columns, count = self.columns, batch.num_rows
        of = dict(zip(self.columns.names, batch.columns, strict=True))
        needed = [name for name in (columns.user, columns.item, columns.time) if name]
        lacks = {name: gaps(of[name]) for name in needed}
        missing = np.logical_or.reduce(list(lacks.values()))
        chosen = None
        if missing.any():
            if self.config.missing == "refuse":
                first = int(np.argmax(missing))
                name = next(name for name in needed if lacks[name][first])
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

    def _add_text(
        self, column: TextColumn, name: str, values: pa.Array, source: TableSource
    ) -> None:
        if not len(values):
            return
        try:
            column.add(values)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"{source}: column {name!r} cannot be read as ids or text ({error}): "
                "write it in one kind in all files"
            ) from None

    def _add_times(self, name: str, values: pa.Array, source: TableSource) -> None:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        kind, stated = values.type, self.config.time_unit
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            values, kind = self._dates(name, values)
        unit = None if stated == "auto" else stated
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            if stated != "auto":
                raise ValueError(
                    f"data.table.time_unit={stated!r}: column {name!r} of {source} holds "
                    "times with a unit of their own: leave it out"
                )
            unit = "us"
            try:
                values = values.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{source}: column {name!r}: {error}") from None
            array = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            array = values.to_numpy(zero_copy_only=False)
        else:
            raise ValueError(
                f"{source}: column {name!r} holds {kind}, no times: name another one by "
                "--config.data.table.time=NAME"
            )
        if self.times and unit != self.unit:
            raise ValueError(
                f"{source}: column {name!r} holds {kind}, unlike the files before: write "
                "times in one way in all of them"
            )
        self.unit = unit
        self.times.append(compact(array))

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

    def _add_action(self, name: str, values: pa.Array, source: TableSource) -> None:
        kind = values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            if values.null_count:
                number = values.cast(pa.int8()) if pa.types.is_boolean(kind) else values
                values = number.cast(pa.float64(), safe=False)
            other = name in self.texts
            numbers = values.to_numpy(zero_copy_only=False)
            if not isinstance(source, DelimitedFile):  # whose columns say what they are
                numbers = narrow(numbers)
            self.numbers.setdefault(name, []).append(numbers)
        elif pa.types.is_nested(kind) or pa.types.is_temporal(kind) or pa.types.is_binary(kind):
            raise ValueError(
                f"{source}: column {name!r} holds {kind}, which can be no action: use "
                "numbers, true and false, or text"
            )
        else:
            other = name in self.numbers
            self._add_text(self.texts.setdefault(name, TextColumn()), name, values, source)
        if other:
            raise ValueError(f"{source}: column {name!r} holds {kind}, unlike the files before")

    def place(self, event: int) -> str:
        """Where an event was read."""
        for piece in self.pieces:
            if event < piece.count:
                row = event if piece.chosen is None else int(piece.chosen[event])
                return piece.source.place(piece.row + row)
            event -= piece.count
        raise IndexError(f"event {event}")

    def group(
        self, first: TableSource, titles: Titles | None, items: TableSource | None
    ) -> tuple[Interactions, Reading]:
        """All that was read."""
        columns, config = self.columns, self.config
        if not any(piece.count for piece in self.pieces):
            raise ValueError(f"{first} has no events: expected rows below the header")
        user, item = self._coded("user", first), self._coded("item", first)
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
        described: ItemTable | None = None
        if items is not None:
            described = read_items(items, config, columns.item, events.item.ids)
            titles = known = described.titles
            dropped |= self._without_unlisted(events, known, items)
            if config.catalog == "listed":
                events.item = events.item.among(list(known))
        try:
            interactions, more = grouping.group(events, config, titles)
        except ValueError as error:
            raise ValueError(f"{first}: {error}") from None
        if described is not None:
            catalog = described.described(interactions.catalog)
            interactions = dataclasses.replace(interactions, catalog=catalog)
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

    def _coded(self, part: str, first: TableSource) -> Coded:
        own = isinstance(first, TableFile | Frame)
        try:
            return self.ids[part].take(ids if own else exact_ids)
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
                actions[name] = joined(parts, np.int32 if whole else np.float32)
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
        values = joined(self.times, np.int64 if whole else np.float64)
        low, high = values.min(), values.max()
        if self.unit is None:
            self.unit = unit = meaning.unit_by_range(low.item(), high.item(), name, self.config)
            early_E = values < EARLY * TICKS[unit] if unit != "s" else np.zeros(len(values), bool)
            if 2 * early_E.sum() > len(values):  # the late ones are the odd ones
                raise ValueError(
                    f"{self.place(int(np.argmax(values)))}: column {name!r}: {high} among times "
                    f"in a coarser unit than {meaning.unit_words(unit)}: two units are mixed"
                )
            if early_E.any():
                raise ValueError(
                    f"{self.place(int(np.argmin(values)))}: column {name!r}: {low} among times in "
                    f"{meaning.unit_words(unit)} would be "
                    f"{meaning.day(int(meaning.seconds(np.array([low]), unit)[0]))}: are two units "
                    f"mixed? If not, say so by --config.data.table.time_unit={unit}"
                )
        unit = self.unit
        try:
            first, last = (int(meaning.seconds(np.array([v]), unit)[0]) for v in (low, high))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r}: {error}") from None
        span = first, last
        if last - first > _MAX_SPAN:
            early, late = (self.place(int(event)) for event in (values.argmin(), values.argmax()))
            raise ValueError(
                f"{late}: time {last} is more than 2^31 - 1 seconds after time {first} of {early}: "
                "a model takes 68 years"
            )
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

    def _without_unlisted(
        self, events: EventColumns, known: Mapping[int | str, str], items: TableSource
    ) -> dict[str, int]:
        """Sees to items that the items table lacks; how many events are dropped."""
        listed_I = np.array([raw in known for raw in events.item.ids.tolist()])
        if listed_I.all() or self.config.unlisted_items == "keep":
            return {}
        keep_E = listed_I[events.item.code_E]
        words = f"of items that {items} lacks"
        if self.config.unlisted_items == "refuse":
            event = int(np.argmin(keep_E))
            raise ValueError(
                f"{self.place(event)}: column {self.columns.item!r}: the item "
                f"{events.item.ids.tolist()[events.item.code_E[event]]!r} is not in "
                f"{items}, which lacks {int((~listed_I).sum())} of "
                f"{len(listed_I)} items: add them, or choose --config.data.table.unlisted_items="
                "keep (without a title) or drop"
            )
        _log.warning("dropped %d events %s", int((~keep_E).sum()), words)
        events.select(keep_E)
        return {words: int((~keep_E).sum())}
