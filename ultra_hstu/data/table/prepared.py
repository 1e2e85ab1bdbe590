"""Tables of events, anybody's own (`table`) and public ones, as `Interactions`.

Files are read once, in batches, and prepared under `data.data_dir`: arrays in one npz file, the
catalogue, the features of users, and how the columns were read.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path

from ultra_hstu import paths
from ultra_hstu.config import DataConfig
from ultra_hstu.data import npz, sources, sums
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.public import Opened
from ultra_hstu.data.raw import locked, say_left_behind, slug
from ultra_hstu.data.table import columns as meaning
from ultra_hstu.data.table.columns import Columns, Reading
from ultra_hstu.data.table.files import FileLayout, find_files, open_file
from ultra_hstu.data.table.reader import from_sources
from ultra_hstu.data.table.sides import read_users

_log = logging.getLogger(__name__)
_VERSION = 2  # of what is prepared
_EVENTS, _READING = "interactions.npz", "reading.json"
CATALOG, CONTEXTS = "catalog.npz", "contexts.npz"
_REMEDY = "its folder can be deleted"


def load(config: DataConfig) -> Interactions:
    """The events of a table, prepared under `config.data_dir` where they are not yet.

    Raises:
        ValueError: bad input; names file, line (row group), column, value and remedy.
        ConnectionError: a public set cannot be downloaded; says what to fetch by hand.
    """
    opened = open_source(config)
    folder = prepare(config, opened)
    reading = read_reading(folder)
    if config.source == sources.TABLE:  # whose columns are a guess
        for line in reading.lines():
            _log.info(line)
    for reason, count in reading.dropped.items():
        _log.info("dropped: %d of %d events %s", count, reading.events, reason)
    contexts = Contexts.load(folder / CONTEXTS)
    with npz.reading(folder / _EVENTS, "readable", _REMEDY) as file:
        arrays = {name: file[name] for name in file}
    return Interactions(
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
        features=opened.rules.features,
        missing_files=opened.missing_files,
    )


def read_reading(folder: Path) -> Reading:
    """How the data in a prepared folder was read. Raises ValueError where that is damaged."""
    try:
        values = json.loads((folder / _READING).read_text())
        return Reading(
            columns=values["columns"],
            actions=tuple(values["actions"]),
            unread=tuple(values["unread"]),
            unit=values["unit"],
            times=None if values["times"] is None else tuple(values["times"]),
            events=values["events"],
            dropped=values["dropped"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / _READING} is not readable ({error}): {_REMEDY}") from None


def open_source(config: DataConfig) -> Opened:
    """The files of own events, or of a public set. Raises as `load`."""
    if config.source != sources.TABLE:
        return sources.PUBLIC[config.source].open(config)
    table = config.table
    if config.raw_dir is None:
        raise ValueError(
            "data.raw_dir is not set: name your events, such as "
            "--config.data.raw_dir=events.parquet (a file, a folder or a pattern)"
        )
    layout = FileLayout(table.delimiter, table.names, table.quotes)
    events = find_files(config.raw_dir, (table.items_file, table.users_file), layout)
    items, users = (
        None if name is None else open_file(name, FileLayout(table.delimiter))
        for name in (table.items_file, table.users_file)
    )
    named = [one for one in (*events, items, users) if one is not None]
    return Opened(events, items, users, table, {str(one): sums.digest(one.path) for one in named})


def prepare(config: DataConfig, opened: Opened) -> Path:
    """The folder of the prepared events, made where it is not there: whole, or not at all.

    It is named after the content of the files and the settings that they are read with. What was
    damaged since is prepared again, with a warning.
    """
    data_dir, events, rules = paths.data_folder(config.data_dir), opened.events, opened.rules
    made_from = (_VERSION, dataclasses.asdict(rules), list(opened.sums.values()))
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()
    folder = data_dir / f"{slug(config.source)}-{key[:16]}"
    if (damage := sums.damage(folder)) is None:
        return folder
    columns = choose_columns(opened)
    say_left_behind(config)
    with locked(data_dir / f"{slug(config.source)}.lock", f"the data must be prepared ({damage})"):
        if sums.damage(folder) is None:  # made by another run meanwhile
            return folder
        if folder.exists():
            _log.warning("%s: the data is prepared again", damage)
        count = f" and {len(events) - 1} more" if len(events) > 1 else ""
        kinds = ", ".join(f"{name} ({events[0].types[name]})" for name in columns.names)
        _log.info("preparing %s%s: %s", events[0], count, kinds)
        part = folder.with_name(folder.name + ".incomplete")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        started = time.perf_counter()
        try:
            _write(part, *read(opened))
            sums.write(part, sums.checksums(part, [path.name for path in part.iterdir()]))
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            _log.info("prepared in %.1f s", time.perf_counter() - started)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def choose_columns(opened: Opened) -> Columns:
    """The columns of events that are read."""
    events, rules = opened.events[0], opened.rules
    # Columns of public sets are named, and events of those have no titles.
    items = opened.items is not None or opened.public
    return meaning.choose(list(events.types), rules, events, items=items)


def read(opened: Opened) -> tuple[Interactions, Contexts, Reading]:
    """What the files hold, with what is known of users. Raises as `load`."""
    columns = choose_columns(opened)
    interactions, reading = from_sources(opened.events, columns, opened.rules, items=opened.items)
    contexts = Contexts()
    if opened.users is not None:
        contexts = read_users(opened.users, columns.user, interactions.users)
    return interactions, contexts, reading


def _write(folder: Path, interactions: Interactions, contexts: Contexts, reading: Reading) -> None:
    """Writes all that is prepared."""
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
