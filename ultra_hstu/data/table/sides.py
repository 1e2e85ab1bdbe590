"""The tables beside own events: titles and features of items, and features of users."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped

from ultra_hstu.data.catalog import Catalog, few
from ultra_hstu.data.contexts import Contexts, in_order
from ultra_hstu.data.item_features import ItemColumn, ItemNumbers, ItemTexts
from ultra_hstu.data.strings import STRINGS, is_strings
from ultra_hstu.data.table import columns as meaning
from ultra_hstu.data.table.chunks import BadId, TextColumn, exact_ids, ids, texts
from ultra_hstu.data.table.files import TableFile
from ultra_hstu.data.table.source import TableSource
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
MAX_CODES = 1000  # distinct values of a feature of users

Ids = Shaped[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, eq=False)
class ItemTable:
    """What a table of items says.

    Attributes:
      titles: by raw id, "" where an item has none.
      features: columns of the items of `titles`, in their order.
    """

    titles: dict[int | str, str]
    features: dict[str, ItemColumn]

    def described(self, catalog: Catalog) -> Catalog:
        """The catalogue with the features of its items; of those that the table lacks, nothing."""
        if not self.features:
            return catalog
        place = {raw: number for number, raw in enumerate(self.titles)}
        order = np.array([place.get(raw, -1) for raw in catalog.raw_ids[1:].tolist()], np.int64)
        features = {name: column.reordered(order) for name, column in self.features.items()}
        return dataclasses.replace(catalog, features=features)


def read_items(file: TableSource, config: TableConfig, item: str, known: Ids) -> ItemTable:
    """The titles and features of the table of items.

    Args:
        file: the table of items.
        item: the column of ids in the events, which is looked for first.
        known: ids of the events, for their kind.

    Raises:
        ValueError: missing columns, bad ids, an own item with two rows that differ in features;
            names file, line and remedy.
    """
    column = _id_column(file, item, meaning.ITEMS, "items_file")
    names = [name for name in file.types if name != column]
    title = config.item_title or meaning.find(names, meaning.TITLES)
    # Items of a public set may have no title, and own ones that have features.
    if title not in names and not (title is None and (config.items_file is None or named(config))):
        raise ValueError(
            f"data.table.items_file: {file} has no column of titles"
            f"{'' if title is None else f' {title!r}'}; there are {meaning.listed(names)}: name "
            "it by --config.data.table.item_title=NAME"
        )
    for name in named(config):
        if name not in names:
            raise ValueError(
                f"data.table.item_features, or features.items: {file} has no column {name!r}; "
                f"there are {meaning.listed(names)}"
            )
    of_row, columns, arrays = _read(
        file, column, [] if title is None else [title], known, named(config)
    )
    codes, values = columns[title] if title else (np.full(len(of_row), -1), [])
    row_n = _one_row_each(file, config, of_row, arrays)
    titles = {
        raw: values[code] if code >= 0 else ""
        for raw, code in zip(of_row[row_n].tolist(), codes[row_n].tolist(), strict=True)
    }
    features = {
        name: _feature(arrays[name].take(pa.array(row_n)), config.item_separator)
        for name in config.item_features
    }
    return ItemTable(titles, features)


def named(config: TableConfig) -> list[str]:
    """The columns of the table of items that are read beside ids and titles."""
    times = [] if config.item_time is None else [config.item_time]
    return list(dict.fromkeys([*config.item_features, *times]))


def _one_row_each(
    file: TableSource, config: TableConfig, of_row: Ids, arrays: dict[str, pa.Array]
) -> Int64[np.ndarray, " n"]:
    """The row of every item that counts: the newest by `item_time`, else the first."""
    rows = np.arange(len(of_row))
    if config.item_time is not None:
        times = arrays[config.item_time]
        if not (pa.types.is_temporal(times.type) or _is_number(times.type)):
            raise ValueError(
                f"data.table.item_time={config.item_time!r}: {file} has {times.type} there: it "
                "must hold dates or numbers"
            )
        seconds = pc.cast(times, pa.int64()) if pa.types.is_temporal(times.type) else times
        newest = np.argsort(
            -seconds.cast(pa.float64()).fill_null(-np.inf).to_numpy(), kind="stable"
        )
        return newest[np.sort(np.unique(of_row[newest], return_index=True)[1])]
    first, item_n = np.unique(of_row, return_index=True, return_inverse=True)[1:]
    again = np.flatnonzero(first[item_n] != rows)
    if len(again) and config.items_file is not None:
        for name in config.item_features:
            column = arrays[name]
            pairs = ((int(row), int(first[item_n[row]])) for row in again)
            other = next((two for two in pairs if column[two[0]] != column[two[1]]), None)
            if other is not None:
                raise ValueError(
                    f"{file.place(other[0])}: item {of_row.tolist()[other[0]]!r} has {name} "
                    f"{str(column[other[0]])[:40]!r}, and {str(column[other[1]])[:40]!r} in "
                    f"{file.place(other[1])}: leave one row, or name a column of times by "
                    "--config.data.table.item_time=NAME, whose newest row counts"
                )
    if len(again):
        _log.warning("%s: %d rows repeat an id; the first of them counts", file, len(again))
    return np.sort(first)


def _feature(column: pa.Array, separator: str | None) -> ItemColumn:
    """Numbers as numbers; text, and whatever else there is, as text."""
    if _is_number(column.type):
        return ItemNumbers.of(column.cast(pa.float64()).fill_null(np.nan).to_numpy())
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return ItemTexts.from_arrow(column)
    texts_n = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return ItemTexts.from_arrow(pc.split_pattern(texts_n, separator) if separator else texts_n)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def read_users(file: TableSource, user: str, users: Ids) -> Contexts:
    """The features of the table of users: its columns with at most 1,000 distinct values.

    Args:
        file: the table of users.
        user: the column of ids in the events, which is looked for first.
        users: raw ids of the users that are left.

    Raises:
        ValueError: missing columns, bad ids, a user who comes twice.
    """
    column = _id_column(file, user, meaning.USERS, "users_file")
    names = [name for name in file.types if name != column]
    of_row, columns, _ = _read(file, column, names, users)
    order = np.argsort(of_row, kind="stable")
    again = np.flatnonzero(of_row[order][1:] == of_row[order][:-1])
    if len(again):
        row = int(order[again + 1].min())
        raise ValueError(
            f"{file.place(row)}: user {of_row.tolist()[row]!r} comes a second time: leave one row"
        )
    codes, values = {}, {}
    for name, (code_U, known) in columns.items():
        if len(known) > MAX_CODES:
            _log.warning(
                "%s: column %r has %d distinct values, too many for a feature of users (at most "
                "%d): it is not read",
                file,
                name,
                len(known),
                MAX_CODES,
            )
            continue
        ordered = file.documented.get(name) or in_order(set(known) - {""})
        place = {text: code for code, text in enumerate(ordered, 1)}
        code_of = np.array([*(place.get(text, 0) for text in known), 0], np.int32)
        codes[name], values[name] = code_of[code_U][order], ("", *ordered)
    lacking = users[~np.isin(users, of_row)]
    if len(lacking):
        _log.warning(
            "%d of %d users have no row in %s, so that their features are unknown: %s",
            len(lacking),
            len(users),
            file,
            few(lacking),
        )
    return Contexts(of_row[order], codes, values)


def _id_column(file: TableSource, name: str, usual: list[str], field: str) -> str:
    names = list(file.types)
    found = name if name in names else meaning.find(names, usual)
    if found is None:
        raise ValueError(
            f"data.table.{field}: {file} has no column {name!r}, as the events have, nor one "
            f"of a usual name; there are {meaning.listed(names)}: rename its column of ids"
        )
    return found


def _read(
    file: TableSource, column: str, names: list[str], known: Ids, plain: Sequence[str] = ()
) -> tuple[Ids, dict[str, tuple[np.ndarray, list[str]]], dict[str, pa.Array]]:
    """The id of every row, in the kind of `known`; other columns as codes of their texts.

    Those of `plain` come as they are.
    """
    kept = [name for name in names if not pa.types.is_nested(file.types[name])]
    csv = isinstance(file, TableFile) and file.format == "csv"
    kinds = {name: pa.string() if csv else file.types[name] for name in [*kept, column]}
    gathered = {name: TextColumn() for name in kinds}
    parts: dict[str, list[pa.Array]] = {name: [] for name in plain}
    row = 0
    for batch in file.batches({name: file.types[name] for name in plain} | kinds):
        for name in kinds:
            if name == column and batch[name].null_count:
                first = int(np.argmax(batch[name].is_null().to_numpy(zero_copy_only=False)))
                raise ValueError(f"{file.place(row + first)}: column {column!r} misses an id")
            if len(batch):
                gathered[name].add(batch[name])
        for name, some in parts.items():
            coded = pa.types.is_dictionary(batch[name].type)
            some.append(batch[name].dictionary_decode() if coded else batch[name])
        row += len(batch)
    if not row:
        raise ValueError(f"{file} has no rows")
    try:
        own = isinstance(file, TableFile)
        of = gathered.pop(column).take(ids if own else exact_ids)
    except BadId as bad:
        raise ValueError(
            f"{file.place(bad.event)}: column {column!r}: {bad.problem}: {str(bad.value)[:80]!r}"
        ) from None
    distinct = of.ids.astype(STRINGS) if is_strings(known) else of.ids
    coded = {name: one.take(texts) for name, one in gathered.items()}
    arrays = {name: pa.concat_arrays(some) for name, some in parts.items()}
    return distinct[of.code_E], {n: (c.code_E, c.ids.tolist()) for n, c in coded.items()}, arrays
