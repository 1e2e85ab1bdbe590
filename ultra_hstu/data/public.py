"""What a public data set is: its files, how they are written, and what their columns are."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ultra_hstu.config import DataConfig
from ultra_hstu.data.download import Download
from ultra_hstu.data.raw import raw_files
from ultra_hstu.data.table.source import TableSource
from ultra_hstu.data.text import stored
from ultra_hstu.table_config import RULES, TableConfig


@dataclasses.dataclass(frozen=True)
class SetFile:
    """A file of a publisher.

    Attributes:
        name: as the publisher has it. A copy may be unpacked, without ".gz", or packed, with it.
        open: reads it from where it is.
        optional: whether the set can be read without it.
    """

    name: str
    open: Callable[[Path], TableSource]
    optional: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A public data set.

    Attributes:
        name: the value of `data.source`.
        about: what it contains, for the table of the sets.
        events: files of events, in the order in which ties are read.
        items: the file of the items: titles and features.
        users: the file of the users, whose columns are contextual features.
        table: what the columns are, by their roles, and which events are kept.
        downloads: where the publisher offers all files.
    """

    name: str
    about: str
    events: tuple[SetFile, ...]
    items: SetFile | None = None
    users: SetFile | None = None
    table: TableConfig
    downloads: tuple[Download, ...] = ()

    def _named(self, optional: bool) -> tuple[str, ...]:
        every = (*self.events, self.items, self.users)
        return tuple(one.name for one in every if one is not None and one.optional == optional)

    @property
    def files(self) -> tuple[str, ...]:
        """Files that a copy must have."""
        return self._named(optional=False)

    @property
    def context_files(self) -> tuple[str, ...]:
        """Files that a copy may lack."""
        return self._named(optional=True)

    @property
    def timed(self) -> bool:
        return self.table.time is not None

    def rules(self, config: TableConfig) -> TableConfig:
        """How the set is read under `data.table`, which says only what is kept of it."""
        default = TableConfig()
        chosen = {
            name: getattr(config, name)
            for name in RULES
            if getattr(config, name) != getattr(default, name)
        }
        return dataclasses.replace(self.table, **chosen)

    def open(self, config: DataConfig) -> "Opened":
        """The files of the set, downloaded where `config.raw_dir` is None.

        Raises:
            ValueError: files missing from raw_dir, or a data_dir that cannot be written.
            ConnectionError: the publisher cannot be reached.
        """
        folder, sums = raw_files(self, config)

        def side(file: SetFile | None) -> TableSource | None:
            path = None if file is None else stored(folder, file.name)
            return None if file is None or path is None else file.open(path)

        lacking = tuple(name for name in self.context_files if stored(folder, name) is None)
        return Opened(
            tuple(one.open(stored(folder, one.name) or folder / one.name) for one in self.events),
            side(self.items),
            side(self.users),
            self.rules(config.table),
            sums,
            lacking,
            public=True,
        )


@dataclasses.dataclass(frozen=True)
class Opened:
    """What events are read from.

    Attributes:
        events: at least one.
        items, users: the tables beside them.
        rules: columns by their roles, and which events are kept.
        sums: of the content of all files, by their names.
        missing_files: that a set may have, and that are not there.
        public: whether this is a public set, whose columns are named.
    """

    events: Sequence[TableSource]
    items: TableSource | None
    users: TableSource | None
    rules: TableConfig
    sums: Mapping[str, str]
    missing_files: tuple[str, ...] = ()
    public: bool = False
