"""The tables beside own events: titles of items, and features of users."""

import logging

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from ultra_hstu.data.catalog import few
from ultra_hstu.data.contexts import Contexts, in_order
from ultra_hstu.data.strings import STRINGS, is_strings
from ultra_hstu.data.table import columns as meaning
from ultra_hstu.data.table.chunks import BadId, TextColumn, ids, texts
from ultra_hstu.data.table.files import TableFile
from ultra_hstu.data.table.source import Source
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
MAX_CODES = 1000  # distinct values of a feature of users

Ids = Shaped[np.ndarray, " _"]


def read_titles(file: Source, config: TableConfig, item: str, known: Ids) -> dict[int | str, str]:
    """The title of every item of the table of items, by raw id; "" where it has none.

    Args:
        file: the table of items.
        item: the column of ids in the events, which is looked for first.
        known: ids of the events, for their kind.

    Raises:
        ValueError: missing columns, bad ids; names file, line and remedy.
    """
    column = _id_column(file, item, meaning.ITEMS, "items_file")
    names = [name for name in file.types if name != column]
    title = config.item_title or meaning.find(names, meaning.TITLES)
    # Items of a public set may have none.
    if title not in names and not (title is None and config.items_file is None):
        raise ValueError(
            f"data.table.items_file: {file} has no column of titles"
            f"{'' if title is None else f' {title!r}'}; there are {meaning.listed(names)}: name "
            "it by --config.data.table.item_title=NAME"
        )
    of_row, columns = _read(file, column, [] if title is None else [title], known)
    codes, values = columns[title] if title else (np.full(len(of_row), -1), [])
    titles: dict[int | str, str] = {}
    again = 0
    for raw, code in zip(of_row.tolist(), codes.tolist(), strict=True):
        again += raw in titles
        titles.setdefault(raw, values[code] if code >= 0 else "")
    if again:
        _log.warning("%s: %d rows repeat an id; the first of them counts", file, again)
    return titles


def read_users(file: Source, user: str, users: Ids) -> Contexts:
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
    of_row, columns = _read(file, column, names, users)
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


def _id_column(file: Source, name: str, usual: list[str], field: str) -> str:
    names = list(file.types)
    found = name if name in names else meaning.find(names, usual)
    if found is None:
        raise ValueError(
            f"data.table.{field}: {file} has no column {name!r}, as the events have, nor one "
            f"of a usual name; there are {meaning.listed(names)}: rename its column of ids"
        )
    return found


def _read(
    file: Source, column: str, names: list[str], known: Ids
) -> tuple[Ids, dict[str, tuple[np.ndarray, list[str]]]]:
    """The id of every row, in the kind of `known`; and other columns as codes of their texts."""
    kept = [name for name in names if not pa.types.is_nested(file.types[name])]
    csv = isinstance(file, TableFile) and file.format == "csv"
    kinds = {name: pa.string() if csv else file.types[name] for name in [*kept, column]}
    gathered = {name: TextColumn() for name in kinds}
    row = 0
    for batch in file.batches(kinds):
        for name in kinds:
            if name == column and batch[name].null_count:
                first = int(np.argmax(batch[name].is_null().to_numpy(zero_copy_only=False)))
                raise ValueError(f"{file.place(row + first)}: column {column!r} misses an id")
            if len(batch):
                gathered[name].add(batch[name])
        row += len(batch)
    if not row:
        raise ValueError(f"{file} has no rows")
    try:
        of = gathered.pop(column).take(ids)
    except BadId as bad:
        raise ValueError(
            f"{file.place(bad.event)}: column {column!r}: {bad.problem}: {str(bad.value)[:80]!r}"
        ) from None
    distinct = of.ids.astype(STRINGS) if is_strings(known) else of.ids
    coded = {name: one.take(texts) for name, one in gathered.items()}
    return distinct[of.code_E], {n: (c.code_E, c.ids.tolist()) for n, c in coded.items()}
